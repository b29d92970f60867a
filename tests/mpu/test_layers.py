"""Split layers equal their whole counterparts in torch.nn, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron.mpu import (
    ColumnParallelLinear,
    ParallelState,
    RowParallelLinear,
    ShardSpec,
    Topology,
    VocabParallelEmbedding,
)
from megatron.mpu.init import create_parameter, normal
from megatron.mpu.parallel_state import Axis
from tests.distributed import distributed, run_distributed

DTYPE = torch.float64
WHOLE = Axis((0,), 0)
SIZES = (1, 2, 4)


def _state(tensor: int) -> ParallelState:
    return ParallelState.create(Topology(tensor, tensor=tensor))


def _whole(parameter: torch.Tensor, seed: int) -> torch.Tensor:
    """The global value of a parameter that was drawn with ``normal(1.0, seed)``."""
    spec: ShardSpec = parameter.shard_spec
    whole = ShardSpec(spec.name, spec.shape)
    return create_parameter(
        whole, WHOLE, normal(1.0, seed), dtype=DTYPE, device=torch.device("cpu")
    ).data


def _assert_piece(local: torch.Tensor, whole: torch.Tensor, spec: ShardSpec, axis: Axis) -> None:
    """``local`` holds exactly this rank's part of ``whole``, and zeros where it is padding."""
    expected = torch.zeros_like(local)
    for box in spec.rectangles(axis.rank, axis.size):
        expected[box.local_slices] = whole[box.global_slices]
    torch.testing.assert_close(local, expected, rtol=1e-12, atol=1e-12)


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    grad = parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad
    assert grad is not None
    return grad


def _gated(hidden: torch.Tensor) -> torch.Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return torch.tanh(gate) * up


def _linear_pair(tensor: int, main_grad: bool) -> None:
    state = _state(tensor)
    column = ColumnParallelLinear(
        12, 48, name="column", state=state, init_method=normal(1.0, 5), dtype=DTYPE, blocks=(24, 24)
    )
    row = RowParallelLinear(
        24, 12, name="row", state=state, init_method=normal(1.0, 5), dtype=DTYPE
    )
    if main_grad:
        for parameter in (column.weight, row.weight):
            parameter.main_grad = torch.full_like(parameter, 3.0)
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(5, 3, 12, dtype=DTYPE, generator=generator, requires_grad=True)
    seed_grad = torch.randn(5, 3, 12, dtype=DTYPE, generator=generator)
    y = row(_gated(column(x)))
    y.backward(seed_grad)

    x1 = x.detach().clone().requires_grad_()
    a, b = (_whole(w, 5).requires_grad_() for w in (column.weight, row.weight))
    bias_a, bias_b = (torch.zeros(n, dtype=DTYPE, requires_grad=True) for n in (48, 12))
    expected = F.linear(_gated(F.linear(x1, a, bias_a)), b, bias_b)
    expected.backward(seed_grad)

    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, x1.grad, rtol=1e-12, atol=1e-12)
    already = 3.0 if main_grad else 0.0
    for parameter, whole in (
        (column.weight, a),
        (row.weight, b),
    ):
        assert (parameter.grad is None) == main_grad
        spec = parameter.shard_spec
        _assert_piece(_gradient(parameter) - already, whole.grad, spec, state.tensor)
    for parameter, whole in ((column.bias, bias_a), (row.bias, bias_b)):
        _assert_piece(parameter.grad, whole.grad, parameter.shard_spec, state.tensor)


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("tensor", SIZES)
def test_column_then_row_equals_two_linears(tensor: int, main_grad: bool) -> None:
    run_distributed(tensor, _linear_pair, tensor, main_grad)


def _gather_and_scatter(tensor: int) -> None:
    state = _state(tensor)
    kwargs = {"state": state, "init_method": normal(1.0, 5), "dtype": DTYPE}
    column = ColumnParallelLinear(8, 16, name="c", gather_output=True, **kwargs)
    row = RowParallelLinear(16, 8, name="r", input_is_parallel=False, **kwargs)
    x = torch.linspace(-1, 1, 24, dtype=DTYPE).view(3, 8).requires_grad_()
    hidden = column(x)
    row(hidden).square().sum().backward()

    x1 = x.detach().clone().requires_grad_()
    a, b = _whole(column.weight, 5).requires_grad_(), _whole(row.weight, 5)
    expected = F.linear(x1, a)
    torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=1e-12)
    F.linear(expected, b).square().sum().backward()
    torch.testing.assert_close(x.grad, x1.grad, rtol=1e-12, atol=1e-12)
    _assert_piece(column.weight.grad, a.grad, column.weight.shard_spec, state.tensor)


@pytest.mark.parametrize("tensor", SIZES)
def test_gathered_output_and_scattered_input(tensor: int) -> None:
    run_distributed(tensor, _gather_and_scatter, tensor)


def _embedding(tensor: int, vocab: int, padded: int, main_grad: bool) -> None:
    state = _state(tensor)
    embedding = VocabParallelEmbedding(
        vocab, 6, name="e", state=state, init_method=normal(1.0, 9), dtype=DTYPE, padded=padded
    )
    if main_grad:
        embedding.weight.main_grad = torch.zeros_like(embedding.weight)
    ids = torch.randint(vocab, (7, 5), generator=torch.Generator().manual_seed(3))
    ids[0, :2] = vocab - 1
    output = embedding(ids)
    factor = torch.arange(output.numel(), dtype=DTYPE).view_as(output)
    (output * factor).sum().backward()

    reference = nn.Embedding.from_pretrained(_whole(embedding.weight, 9), freeze=False)
    expected = reference(ids)
    (expected * factor).sum().backward()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert reference.weight.grad is not None
    _assert_piece(
        _gradient(embedding.weight),
        reference.weight.grad,
        embedding.weight.shard_spec,
        state.tensor,
    )


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize(("vocab", "padded"), [(16, 16), (13, 16), (3, 8)])
@pytest.mark.parametrize("tensor", SIZES)
def test_embedding_equals_torch(tensor: int, vocab: int, padded: int, main_grad: bool) -> None:
    run_distributed(tensor, _embedding, tensor, vocab, padded, main_grad)


@distributed(2)
def test_main_grad_may_be_wider_than_the_weight() -> None:
    state = _state(2)
    layer = ColumnParallelLinear(
        4, 8, name="c", state=state, init_method=normal(1.0, 1), dtype=torch.bfloat16
    )
    layer.weight.main_grad = torch.zeros(4, 4, dtype=torch.float32)
    for _ in range(3):
        layer(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.weight.main_grad, torch.full((4, 4), 6.0))
