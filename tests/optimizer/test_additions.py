"""Small half-precision gradients are added together, in time, and to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.mpu import recompute
from megatron.mpu.init import normal
from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.topology import Topology
from megatron.ops import kernels
from megatron.optimizer import GradientBuffers
from megatron.optimizer.additions import LARGEST, TOGETHER
from tests.distributed import distributed
from tests.optimizer.support import SEED, plain_parameter
from tests.training.device_rules import OperatorGraphs

SINGLE = ParallelState.single()
HALF = (torch.float16, torch.bfloat16)
HIDDEN, LAYERS = 6, 50
Use = Callable[["Vectors", Tensor], Tensor]


class Vectors(nn.Module):
    """Many small parameters, and a matrix whose gradient autograd hands over as well."""

    def __init__(self, dtype: torch.dtype, state: ParallelState = SINGLE) -> None:
        super().__init__()
        draw = normal(1.0, SEED)
        for layer in range(LAYERS):
            for kind, size in (("weight", HIDDEN), ("bias", HIDDEN), ("gain", 1)):
                name = f"{layer}_{kind}"
                vector = plain_parameter(name, (size,), state, dtype, draw)
                self.register_parameter(name, vector)
        self.matrix = plain_parameter("matrix", (HIDDEN, HIDDEN), state, dtype, draw)

    def forward(self, x: Tensor) -> Tensor:
        """[b, HIDDEN] -> the same"""
        for layer in range(LAYERS):
            weight, bias, gain = (
                self.get_parameter(f"{layer}_{kind}") for kind in ("weight", "bias", "gain")
            )
            x = torch.tanh(x * weight + bias) * gain
        return x @ self.matrix


def _inputs(dtype: torch.dtype, count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, HIDDEN, generator=generator).to(dtype) for _ in range(count)]


class _Operators(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def _sums(
    choice: str,
    dtype: torch.dtype,
    use: Use = Vectors.forward,
    *,
    state: ParallelState = SINGLE,
    own: slice = slice(None),
    overlapped: bool = True,
    **options: Any,
) -> tuple[list[Tensor], list[str]]:
    """The gradients of a step of two micro-batches on each rank, and what ran in the last one."""
    net = Vectors(dtype, state)
    gradients = GradientBuffers([net], state, bucket_size=1500, **options)
    inputs = _inputs(dtype, 2 * state.data.size)[own]
    with kernels.using(choice):
        gradients.zero()
        for last, x in enumerate(inputs):
            loss = use(net, x).sum()
            if last and overlapped:
                gradients.on_last_backward(0)
            with _Operators() as operators:
                loss.backward()
            assert dtype not in HALF or all(p.grad is None for p in net.parameters())
        if state is SINGLE:
            before = _main_grads(net)
        gradients.finish()
    if state is SINGLE:  # nothing was left for the end
        assert all(map(torch.equal, before, _main_grads(net)))
    return [shard.gradients.clone() for shard in gradients.shards], operators.names


def _main_grads(net: nn.Module) -> list[Tensor]:
    return [p.main_grad.clone() for p in net.parameters()]  # type: ignore[attr-defined]


def _same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    assert any(bool(gradient.any()) for gradient in one)
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("dtype", HALF)
def test_sums_are_those_of_one_addition_after_the_other(dtype: torch.dtype) -> None:
    wanted, plain = _sums("torch", dtype)
    got, operators = _sums("emulated", dtype)
    assert _same_bits(got, wanted)
    assert "add_at_" not in plain
    # The matrix lies in a buffer of its own; buckets of the others are sent when they are full.
    assert 0 < operators.count("add_at_") < 3 * LAYERS


def test_so_many_go_together_in_a_pass_that_is_not_the_last() -> None:
    net = Vectors(torch.bfloat16)
    gradients = GradientBuffers([net], SINGLE, bucket_size=10**6)
    gradients.zero()
    with kernels.using("emulated"), _Operators() as operators:
        net(*_inputs(torch.bfloat16, 1)).sum().backward()
    of_vectors = -(-3 * LAYERS // TOGETHER)
    assert operators.names.count("add_at_") == of_vectors + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_others_are_left_to_autograd(dtype: torch.dtype) -> None:
    assert "add_at_" not in _sums("emulated", dtype)[1]


def test_a_large_gradient_does_not_wait() -> None:
    table = plain_parameter("table", (LARGEST + 1,), SINGLE, torch.bfloat16, normal(1.0, SEED))
    net = nn.ParameterList([table])
    gradients = GradientBuffers([net], SINGLE, bucket_size=1500)
    gradients.zero()
    with kernels.using("emulated"), _Operators() as operators:
        table.sum().backward()
    assert "add_at_" not in operators.names
    assert bool((_main_grads(net)[0] == 1).all())


def _recomputed_twice(net: Vectors, x: Tensor) -> Tensor:
    """Each parameter's gradient arrives in two backward passes within one, and behind them."""
    for _ in range(2):
        x = recompute(net, x, streams=SINGLE.streams)
    return net(x)


def test_a_gradient_that_arrives_several_times_is_added_each_time() -> None:
    (wanted, _), (got, operators) = (
        _sums(choice, torch.bfloat16, _recomputed_twice, overlapped=False)
        for choice in ("torch", "emulated")
    )
    assert _same_bits(got, wanted)
    assert "add_at_" in operators


@pytest.mark.parametrize("scattered", [False, True])
@distributed(2)
def test_no_bucket_is_sent_before_its_gradients_are_added(scattered: bool) -> None:
    state = ParallelState.create(Topology(2))
    own = slice(state.data.rank, None, 2)
    for dtype in HALF:
        wanted, got = (
            _sums(choice, dtype, state=state, own=own, scattered=scattered)[0]
            for choice in ("torch", "emulated")
        )
        assert _same_bits(got, wanted)
    state.destroy()


@contextmanager
def _recorder(gradients: GradientBuffers) -> Iterator[OperatorGraphs]:
    buffers = [b.gradients for b in gradients.buffers if b.gradients is not None]
    with kernels.using("emulated"):
        yield OperatorGraphs(lambda: buffers)


def test_a_recorded_backward_pass_adds_all_of_them() -> None:
    net = Vectors(torch.bfloat16)
    gradients = GradientBuffers([net], SINGLE, bucket_size=1500)
    first, second = _inputs(torch.bfloat16, 2)
    x = first.clone()

    def work() -> dict[str, Tensor]:
        loss = net(x).sum()
        loss.backward()
        return {"loss": loss.detach()}

    with _recorder(gradients) as record:
        gradients.zero()
        work()
        x.copy_(second)
        work()
        gradients.finish()
        wanted = _main_grads(net)
        gradients.zero()
        recording = record(work)
        gradients.finish()
        assert not any(bool(sums.any()) for sums in _main_grads(net))
        for values in (first, second):
            x.copy_(values)
            recording.replay()
    assert _same_bits(_main_grads(net), wanted)


def test_a_failed_backward_pass_leaves_nothing_for_the_next_step() -> None:
    net = Vectors(torch.bfloat16)
    gradients = GradientBuffers([net], SINGLE, bucket_size=1500)
    (x,) = _inputs(torch.bfloat16, 1)

    def fail(_: Tensor) -> None:
        raise RuntimeError("as asked")

    with kernels.using("emulated"):
        gradients.zero()
        net(x).sum().backward()
        wanted = _main_grads(net)
        gradients.zero()
        handle = net.get_parameter("0_bias").register_hook(fail)
        with pytest.raises(RuntimeError, match="as asked"):
            net(x).sum().backward()
        handle.remove()
        gradients.zero()
        net(x).sum().backward()
    assert _same_bits(_main_grads(net), wanted)
