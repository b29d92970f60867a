import gc
import weakref

import pytest
import torch
from torch import nn

from megatron.mpu.init import normal
from megatron.mpu.layers import ColumnParallelLinear
from megatron.mpu.parallel_state import ParallelState
from megatron.optimizer import GradientBuffers
from tests.optimizer.support import (
    SEED,
    Net,
    accumulate_gradients,
    loss_of,
    micro_batches,
    plain_parameter,
)

SINGLE = ParallelState.single()


def plain_gradients(net: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    """Sum over the micro-batches, in ``dtype``, of what autograd gives without buffers."""
    parameters = list(net.parameters())
    sums = [torch.zeros_like(p, dtype=dtype) for p in parameters]
    for tokens in micro_batches(3, 0):
        parts = torch.autograd.grad(loss_of(net, tokens, 3), parameters)
        for total, part in zip(sums, parts, strict=True):
            total += part
    return sums


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_micro_batches_add_up(dtype: torch.dtype) -> None:
    expected = plain_gradients(Net(SINGLE, dtype), torch.promote_types(dtype, torch.float32))
    net = Net(SINGLE, dtype)
    gradients = GradientBuffers([net], SINGLE, bucket_size=300)
    for _ in range(2):  # the second time shows that zero() clears
        accumulate_gradients(gradients, net, micro_batches(3, 0), 3)
        for parameter, total in zip(net.parameters(), expected, strict=True):
            # Half-precision embedding gradients: each use of the weight is rounded by itself here.
            rounding = torch.finfo(dtype).eps
            assert torch.allclose(parameter.main_grad, total, rtol=4 * rounding, atol=rounding)


def test_no_gradient_lives_outside_the_buffers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        net = Net(SINGLE, dtype)
        gradients = GradientBuffers([net], SINGLE, bucket_size=300)
        accumulate_gradients(gradients, net, micro_batches(2, 0), 2)
        for parameter in net.parameters():
            if dtype == torch.float32:
                assert parameter.grad.data_ptr() == parameter.main_grad.data_ptr()
            else:
                assert parameter.grad is None


def test_parameters_lie_in_backward_order() -> None:
    net = Net(SINGLE)
    gradients = GradientBuffers([net], SINGLE, bucket_size=300)
    order = list(reversed(list(net.parameters())))
    for buffer in gradients.buffers:
        assert list(buffer.parameters) == [p for p in order if p in set(buffer.parameters)]


def test_frozen_parameters_are_left_alone() -> None:
    net = Net(SINGLE)
    net.embedding.weight.requires_grad_(False)
    gradients = GradientBuffers([net], SINGLE, bucket_size=300)
    assert not hasattr(net.embedding.weight, "main_grad")
    assert all(net.embedding.weight is not p for b in gradients.buffers for p in b.parameters)


def test_a_parameter_of_two_chunks_has_one_place() -> None:
    shared = plain_parameter("shared", (4, 4), SINGLE, torch.float32, normal(1.0, SEED))
    first, second = nn.Module(), nn.Module()
    first.weight, second.weight = shared, shared
    gradients = GradientBuffers([first, second], SINGLE, bucket_size=300)
    assert [p for b in gradients.buffers for p in b.parameters] == [shared]


def test_buffers_are_released_with_their_owner() -> None:
    net = Net(SINGLE, torch.bfloat16)
    gradients = GradientBuffers([net], SINGLE, bucket_size=300)
    accumulate_gradients(gradients, net, micro_batches(1, 0), 1)
    gone = weakref.ref(gradients)
    del gradients
    gc.collect()
    assert gone() is None


def test_layers_fill_buffers_without_autograd_seeing_their_weights() -> None:
    layer = ColumnParallelLinear(
        4,
        4,
        name="layer",
        state=SINGLE,
        init_method=normal(1.0, SEED),
        dtype=torch.float32,
        bias=False,
    )
    gradients = GradientBuffers([layer], SINGLE, bucket_size=300)
    layer.weight.grad = None  # what autograd would add to
    gradients.zero()
    layer(torch.ones(1, 4)).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.weight.main_grad, torch.ones(4, 4))
