"""With the sequence split between the split layers, they still equal their whole counterparts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.mpu import (
    ColumnParallelLinear,
    ParallelState,
    RowParallelLinear,
    Topology,
    VocabParallelEmbedding,
    defer_weight_gradients,
    gather_from_sequence_region,
    parallel_lm_logits,
)
from megatron.mpu.collectives import (
    all_gather,
    all_gather_last_dim,
    own_piece,
    reduce_scatter,
    start_all_gather,
    start_reduce_scatter,
)
from megatron.mpu.init import normal
from tests.distributed import run_distributed

DTYPE = torch.float64
SIZES = (1, 2, 4)


def _draw(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _collectives(tensor: int) -> None:
    axis = ParallelState.create(Topology(tensor, tensor=tensor)).tensor
    every = [_draw(2 * tensor, 3, seed=rank) for rank in range(tensor)]
    mine = every[axis.rank]
    total = torch.stack(every).sum(0)
    _close(all_gather(mine, axis), torch.cat(every))
    _close(all_gather_last_dim(mine, axis), torch.cat(every, dim=-1))
    _close(reduce_scatter(mine.clone(), axis), own_piece(total, axis, dim=0))
    in_place = torch.zeros(2 * tensor * tensor, 3, dtype=DTYPE)
    own = own_piece(in_place, axis, dim=0)
    own.copy_(mine)
    gathering = start_all_gather(own, axis, out=in_place)
    whole = mine.clone()
    part = own_piece(whole, axis, dim=0)
    scattering = start_reduce_scatter(whole, axis, out=part)  # two under way at a time
    _close(gathering.wait(), torch.cat(every))
    assert scattering.wait().data_ptr() == part.data_ptr()
    _close(part, own_piece(total, axis, dim=0))


@pytest.mark.parametrize("tensor", SIZES)
def test_collectives(tensor: int) -> None:
    run_distributed(tensor, _collectives, tensor)


def _whole(axis, local: torch.Tensor, dim: int) -> torch.Tensor:
    """A split weight from the parts of all ranks."""
    parts = all_gather(local.detach().movedim(dim, 0), axis)
    return parts.movedim(0, dim).clone().requires_grad_()


def _block(tensor: int, deferred: bool, main_grad: bool) -> None:
    state = ParallelState.create(Topology(tensor, tensor=tensor))
    axis = state.tensor
    options = {"state": state, "init_method": normal(1.0, 5), "dtype": DTYPE}
    embedding = VocabParallelEmbedding(
        13, 12, name="e", padded=16, sequence_parallel=True, **options
    )
    column = ColumnParallelLinear(12, 24, name="c", sequence_parallel=True, **options)
    row = RowParallelLinear(24, 12, name="r", sequence_parallel=True, **options)
    weights = (embedding.weight, column.weight, row.weight)
    if main_grad:
        for weight in weights:
            weight.main_grad = torch.zeros_like(weight)
    ids = torch.randint(13, (8, 3), generator=torch.Generator().manual_seed(8))
    seed_grad = _draw(8, 3, 16)
    y = row(torch.tanh(column(embedding(ids))))
    assert y.shape == (8 // tensor, 3, 12)
    logits = parallel_lm_logits(y, embedding.weight, axis, None, sequence_parallel=True)
    if deferred:
        with defer_weight_gradients() as left:
            logits.backward(own_piece(seed_grad, axis))
        assert column.weight.outstanding == 1
        left.compute()
        assert column.weight.outstanding == 0
    else:
        logits.backward(own_piece(seed_grad, axis))

    e, a, b = (_whole(axis, w, dim) for w, dim in zip(weights, (0, 0, 1), strict=True))
    bias = torch.zeros(12, dtype=DTYPE, requires_grad=True)
    expected = F.linear(torch.tanh(F.linear(F.embedding(ids, e), a)), b, bias)
    whole_logits = F.linear(expected, e)
    whole_logits.backward(seed_grad)
    _close(gather_from_sequence_region(y, axis, whole_gradient=True), expected)
    _close(logits, own_piece(whole_logits, axis))
    for weight, whole, dim in zip(weights, (e, a, b), (0, 0, 1), strict=True):
        assert (weight.grad is None) == main_grad
        found = weight.main_grad if main_grad else weight.grad
        _close(found, own_piece(whole.grad, axis, dim=dim))
    assert row.bias.shard_spec.partial == (tensor > 1)
    total = all_gather(row.bias.grad.unsqueeze(0), axis).sum(0)
    _close(total, bias.grad)


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("tensor", SIZES)
def test_a_block_with_a_split_sequence(tensor: int, deferred: bool, main_grad: bool) -> None:
    run_distributed(tensor, _block, tensor, deferred, main_grad)


def test_a_parameter_is_completed_by_its_last_product() -> None:
    state = ParallelState.single()
    layer = ColumnParallelLinear(
        4, 4, name="c", state=state, init_method=normal(1.0, 5), dtype=DTYPE
    )
    heard = []
    layer.weight.completed = lambda: heard.append("weight")
    passes = []
    for seed in (1, 2):
        with defer_weight_gradients() as left:
            layer(_draw(3, 4, seed=seed).requires_grad_()).sum().backward()
        passes.append(left)
    passes[0].compute()
    assert heard == []
    passes[1].compute()
    assert heard == ["weight"]
    total = _draw(3, 4, seed=1).sum(0) + _draw(3, 4, seed=2).sum(0)
    _close(layer.weight.grad, total.expand(4, 4))
