"""What a recorder notes, and what does not change a record."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.mpu import Topology
from megatron.mpu.collectives import all_gather, all_reduce, reduce_scatter
from megatron.pipeline.actions import Kind
from megatron.planner import known_results
from megatron.planner.recorder import Recorder
from megatron.planner.recording import RankRecord, plannable, record_ranks
from megatron.planner.trace import Communication, Operation, Wait
from megatron.planner.world import META, group_names, one_rank
from megatron.training import GPTPretraining
from tests.configs import small


def test_storages_count_from_their_making_to_their_end() -> None:
    with Recorder() as recorder:
        a = torch.empty(100, device=META)
        view = a.view(10, 10)
        assert recorder.live == 400
        b = view @ view
        assert recorder.live == 800
        del a
        assert recorder.live == 800  # the view holds it
        del view
        assert recorder.live == 400
        del b
    assert recorder.live == 0
    assert recorder.take()[1] == 800


def test_products_count_their_operations_and_views_nothing() -> None:
    a = torch.empty(4, 6, 8, device=META, dtype=torch.bfloat16)
    b = torch.empty(4, 8, 10, device=META, dtype=torch.bfloat16)
    with Recorder() as recorder:
        torch.bmm(a, b).transpose(1, 2).view(4, 10, 6)
    (product,) = recorder.events
    assert isinstance(product, Operation)
    assert (product.kind, product.shape) == ("matmul", (4, 6, 10, 8))
    assert product.flops == 2 * 4 * 6 * 10 * 8
    assert product.bytes == 2 * 4 * (6 * 8 + 8 * 10 + 6 * 10)


def test_an_operator_in_place_reads_and_writes() -> None:
    a, b = torch.empty(2, 100, device=META)
    with Recorder() as recorder:
        a.add_(b)
        a.zero_()
    added, zeroed = recorder.events
    assert isinstance(added, Operation) and added.bytes == 1200
    assert isinstance(zeroed, Operation) and zeroed.bytes == 400
    assert recorder.live == 0  # nothing was made


@pytest.mark.parametrize("rank", [0, 5, 23])
def test_one_process_is_any_rank(rank: int) -> None:
    topology, recorder = Topology(24, tensor=2, pipeline=3), Recorder()
    with one_rank(topology, rank, "cuda", recorder) as state:
        recorder.names = group_names(state)
        assert (dist.get_rank(), dist.get_world_size()) == (rank, 24)
        assert state.coordinates == topology.coordinates(rank)
        x = torch.empty(8, 4, device=META)
        all_reduce(x, state.tensor)
        assert reduce_scatter(x, state.data).shape == (2, 4)
        assert all_gather(x, state.tensor).shape == (16, 4)
    assert not dist.is_initialized()
    calls = [event for event in recorder.events if isinstance(event, Communication)]
    assert [(c.kind, c.group, c.bytes) for c in calls] == [
        ("all-reduce", "tensor", 128),
        ("reduce-scatter", "data", 128),
        ("all-gather", "tensor", 256),
    ]
    assert calls[0].ranks == next(g for g in topology.tensor_groups() if rank in g)
    # A call that nothing overlaps is waited for at once.
    assert Wait(calls[1].number) in recorder.events and Wait(calls[2].number) in recorder.events


BASE: dict[str, Any] = {
    "model_type": "gpt",
    "vocab_size": 500,
    "bf16": True,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "hidden_dropout": 0.1,
}


def _records(world: int, **flags: Any) -> tuple[RankRecord, ...]:
    config = small(**BASE | flags)
    parallel = config.parallel
    topology = Topology(
        world, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    )
    return record_ranks(plannable(config), GPTPretraining, topology, "cuda")


def test_ranks_of_a_kind_share_a_record() -> None:
    first, *middle, last = _records(
        8, num_layers=16, pipeline_model_parallel_size=8, global_batch_size=16
    )
    assert all(each is middle[0] for each in middle)
    assert first is not middle[0] and last is not middle[0]
    assert first.parameters > middle[0].parameters


def test_parameters_are_those_of_one_process() -> None:
    flags = {"num_layers": 4, "global_batch_size": 16}
    (whole,) = _records(1, **flags)
    split = _records(8, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, **flags)
    assert sum(rank.parameters for rank in split) == whole.parameters


def test_more_micro_batches_or_data_ranks_change_no_action() -> None:
    """But for the first and the last micro-batch, where parameters come and gradients go."""
    few, many = (_records(2, global_batch_size=size) for size in (12, 48))
    assert few[0].actions.keys() == many[0].actions.keys()
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        for one, other in ((few, many), (few, _records(4, global_batch_size=24))):
            a, b = (each[0].actions[0, kind, "middle"] for each in (one, other))
            assert (a.change, a.peak) == (b.change, b.peak)
            assert _without_numbers(a.trace) == _without_numbers(b.trace)


def _without_numbers(trace: Any) -> list[Any]:
    return [event for event in trace if isinstance(event, Operation)]


def test_a_forward_pass_leaves_what_its_backward_pass_takes() -> None:
    for record in _records(4, pipeline_model_parallel_size=2, global_batch_size=16):
        for place in ("first", "middle"):
            forward = record.actions[0, Kind.FORWARD, place]
            backward = record.actions[0, Kind.BACKWARD, place]
            assert forward.change > 0
            assert abs(forward.change + backward.change) < 100  # scalars of the loss
            assert forward.peak >= forward.change


def test_a_stage_without_layers_sends_on_what_it_has_received() -> None:
    records = _records(
        3, pipeline_model_parallel_size=3, pipeline_layers=(2, 0, 2), global_batch_size=12
    )
    forward = [record.actions[0, Kind.FORWARD, "middle"] for record in records]
    assert [segment.passes_on for segment in forward] == [False, True, False]
    assert forward[1].peak == 0


def test_known_results_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"tensor_model_parallel_size": 2, "recompute_granularity": "full", "swiglu": True}
    known = _records(2, **flags)
    monkeypatch.setattr(known_results, "call", lambda func, args, kwargs: func(*args, **kwargs))
    assert _records(2, **flags) == known
