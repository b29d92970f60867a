"""Recomputation is bitwise what holding everything gives, with the same random numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.mpu import ParallelState, Topology, recompute
from tests.distributed import run_distributed


def _part(state: ParallelState, weight: torch.Tensor, equal: bool):
    def part(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        x = F.dropout(x @ weight, 0.3)
        with state.streams.split_region():
            own = F.dropout(x, 0.3)
        return (x if equal else own) * other

    return part


def _gradients(state: ParallelState, recomputed: bool, split: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, weight, other = (torch.randn(8, 8, generator=generator).requires_grad_() for _ in range(3))
    state.streams.start(seed=5, step=1, micro_batch=0)
    part = _part(state, weight, equal=split)
    hidden = x
    for _ in range(3):
        if recomputed:
            axis = state.tensor if split else None
            hidden = recompute(part, hidden, other, streams=state.streams, split_axis=axis)
        else:
            hidden = part(hidden, other)
    after = torch.rand(2)
    with state.streams.split_region():
        after_split = torch.rand(2)
    hidden.sum().backward()
    assert x.grad is not None and weight.grad is not None and other.grad is not None
    return [hidden.detach(), after, after_split, torch.rand(2), x.grad, weight.grad, other.grad]


def _compare(tensor: int, split: bool) -> None:
    state = ParallelState.create(Topology(tensor, tensor=tensor))
    expected = _gradients(state, recomputed=False, split=split)
    found = _gradients(state, recomputed=True, split=split)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tensor", [1, 2])
def test_recomputation_is_bitwise_equal(tensor: int, split: bool) -> None:
    run_distributed(tensor, _compare, tensor, split)


def _held(run) -> int:
    """Bytes that the graph of ``run`` holds, apart from parameters."""
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a node that held its own output would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(storages.values())


def _held_by_ranks(tensor: int) -> None:
    state = ParallelState.create(Topology(tensor, tensor=tensor))
    x = torch.ones(8, 4, requires_grad=True)

    def part(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(torch.tanh(x))

    whole = x.numel() * x.element_size()
    streams = state.streams
    assert _held(lambda: part(x)) == 2 * whole
    assert _held(lambda: recompute(part, x, streams=streams)) == whole
    axis = state.tensor
    assert _held(lambda: recompute(part, x, streams=streams, split_axis=axis)) == whole // tensor


def test_only_inputs_are_held_split_where_asked() -> None:
    run_distributed(2, _held_by_ranks, 2)


def test_parameters_get_gradients_where_no_input_wants_one() -> None:
    weight = torch.ones(3, requires_grad=True)
    state = ParallelState.single()
    recompute(lambda x: x * weight, torch.arange(3.0), streams=state.streams).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0, 1.0, 2.0]
