from math import inf, nan

import pytest
import torch

from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.topology import Topology
from megatron.ops import kernels
from megatron.optimizer.flat_buffer import build_flat_buffers
from megatron.optimizer.grad_norm import global_norm, parameter_count
from tests.distributed import distributed
from tests.optimizer.support import Net

SINGLE = ParallelState.single()
CPU = torch.device("cpu")


def test_float32_norm_of_many_elements_is_accurate() -> None:
    generator = torch.Generator().manual_seed(5)
    # Magnitudes over many orders, as gradients have them.
    flat = torch.randn(1024 * 29_300, generator=generator)
    flat *= torch.rand(flat.shape, generator=generator).pow_(8)
    expected = flat.double().square().sum().sqrt()
    norm = global_norm([flat], SINGLE.model, CPU)
    assert abs(norm / expected - 1) < 1e-7


def test_norm_is_over_all_tensors() -> None:
    tensors = [torch.full((1024,), 3.0), torch.full((2048,), 4.0, dtype=torch.float64)]
    expected = (1024 * 9 + 2048 * 16) ** 0.5
    assert global_norm(tensors, SINGLE.model, CPU).item() == pytest.approx(expected, rel=1e-14)


def test_norm_of_large_gradients_does_not_overflow() -> None:
    flat = torch.full((1024 * 100,), 1e17)  # the squares of all rows add up beyond float32
    expected = 1e17 * 102_400**0.5
    assert global_norm([flat], SINGLE.model, CPU).item() == pytest.approx(expected, rel=1e-6)


def test_norm_of_nothing_is_zero() -> None:
    assert global_norm([], SINGLE.model, CPU).item() == 0.0


@pytest.mark.parametrize("poison", [inf, -inf, nan])
def test_one_bad_element_shows(poison: float) -> None:
    flat = torch.ones(4096)
    flat[3000] = poison
    assert not global_norm([flat], SINGLE.model, CPU).isfinite()


def test_kernel_finds_the_same_norm() -> None:
    generator = torch.Generator().manual_seed(6)
    tensors = [torch.randn(1024 * n, generator=generator) for n in (1, 5, 12)]
    with kernels.using("emulated"):
        found = global_norm(tensors, SINGLE.model, CPU)
        wide = [tensors[0].double(), *tensors[1:]]  # of which no kernel takes the first
        assert abs(global_norm(wide, SINGLE.model, CPU) / found - 1) < 1e-7
    assert abs(global_norm(tensors, SINGLE.model, CPU) / found - 1) < 1e-7


def test_count_leaves_vocabulary_padding_out() -> None:
    net = Net(SINGLE)
    assert parameter_count(net.parameters(), SINGLE) == sum(p.numel() for p in net.parameters())


@distributed(4)
def test_split_model_has_the_norm_and_count_of_the_whole() -> None:
    state = ParallelState.create(Topology(4, tensor=2))
    whole = list(Net(SINGLE).parameters())
    expected = torch.cat([p.detach().flatten() for p in whole]).double().norm()
    net = Net(state)
    buffers = build_flat_buffers(list(net.parameters()), state.tensor.rank, bucket_size=300)
    counted = [buffer.values for buffer in buffers if buffer.counted]
    norm = global_norm(counted, state.model, CPU)
    assert abs(norm / expected - 1) < 1e-6
    assert parameter_count(net.parameters(), state) == sum(p.numel() for p in whole)
    state.destroy()
