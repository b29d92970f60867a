"""Process groups and the getters that read the installed ones."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron import mpu
from megatron.mpu import ParallelState, Topology
from megatron.mpu.collectives import all_reduce, broadcast
from tests.distributed import distributed, run_distributed


def _sums(tensor: int, pipeline: int) -> None:
    state = ParallelState.create(Topology(8, tensor=tensor, pipeline=pipeline))
    for axis in (state.tensor, state.pipeline, state.data, state.model, state.embedding):
        if axis is None:
            continue
        assert axis.ranks[axis.rank] == state.rank
        value = all_reduce(torch.tensor([float(state.rank)]), axis)
        assert value.item() == sum(axis.ranks)
        value = broadcast(torch.tensor([float(state.rank)]), axis, source=axis.size - 1)
        assert value.item() == axis.ranks[-1]
    inner = 0 < state.pipeline.rank < state.pipeline.size - 1
    assert (state.embedding is None) == inner
    assert (state.position_embedding is None) == (state.pipeline.rank > 0)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 2), (1, 4), (4, 1), (1, 1), (8, 1), (1, 8)])
def test_collectives_reach_exactly_the_axis(tensor: int, pipeline: int) -> None:
    run_distributed(8, _sums, tensor, pipeline)


def _several_states(topologies: list[Topology]) -> None:
    for topology in topologies:
        state = ParallelState.create(topology)
        for axis in (state.pipeline, state.model, state.embedding, state.position_embedding):
            if axis is not None:
                value = all_reduce(torch.tensor([float(state.rank)]), axis)
                assert value.item() == sum(axis.ranks)


@pytest.mark.parametrize(
    "topologies",
    [
        [Topology(4, pipeline=4), Topology(4, pipeline=4), Topology(4, tensor=2, pipeline=2)],
        [Topology(4, pipeline=4, split=2), Topology(4, pipeline=4, split=1), Topology(4)],
    ],
)
def test_a_process_may_have_several_states(topologies: list[Topology]) -> None:
    run_distributed(4, _several_states, topologies)


@distributed(4)
def test_every_edge_carries_messages_both_ways() -> None:
    state = ParallelState.create(Topology(4, tensor=1, pipeline=4))
    for edges in (state.forward_edges, state.backward_edges):
        assert len(edges) == 2, "the ring is closed"
        works = []
        received = {}
        for (source, target), group in edges.items():
            if state.rank == source:
                works.append(dist.isend(torch.tensor([source]), target, group=group))
            else:
                received[source] = torch.empty(1, dtype=torch.int64)
                works.append(dist.irecv(received[source], source, group=group))
        for work in works:
            work.wait()
        assert all(value.item() == source for source, value in received.items())


@distributed(4)
def test_getters_read_the_installed_state() -> None:
    assert not mpu.model_parallel_is_initialized()
    with pytest.raises(RuntimeError, match="not initialised"):
        mpu.get_data_parallel_rank()
    mpu.initialize_model_parallel(2, 2)
    rank = dist.get_rank()
    assert mpu.get_tensor_model_parallel_rank() == rank % 2
    assert mpu.get_pipeline_model_parallel_rank() == rank // 2
    assert mpu.get_data_parallel_rank() == 0
    assert mpu.get_tensor_model_parallel_world_size() == 2
    assert mpu.get_pipeline_model_parallel_world_size() == 2
    assert mpu.get_data_parallel_world_size() == 1
    assert mpu.is_pipeline_first_stage() == (rank < 2)
    assert mpu.is_pipeline_last_stage() == (rank >= 2)
    assert mpu.is_rank_in_embedding_group()
    assert mpu.is_rank_in_position_embedding_group() == (rank < 2)
    for group, size in (
        (mpu.get_tensor_model_parallel_group(), 2),
        (mpu.get_pipeline_model_parallel_group(), 2),
        (mpu.get_embedding_group(), 2),
    ):
        assert dist.get_world_size(group) == size
    with pytest.raises(RuntimeError, match="data axis has a single rank"):
        mpu.get_data_parallel_group()
    if rank >= 2:
        with pytest.raises(RuntimeError, match=f"rank {rank} is not in the position embedding"):
            mpu.get_position_embedding_group()
    mpu.destroy_model_parallel()
    assert not mpu.model_parallel_is_initialized()


@distributed(2)
def test_a_topology_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="the topology is for 4 ranks, torch.distributed has 2"):
        ParallelState.create(Topology(4, tensor=2))


def test_one_process_needs_no_process_group() -> None:
    state = ParallelState.create(Topology(1))
    assert not dist.is_initialized()
    value = torch.tensor([3.0])
    assert all_reduce(value, state.model).item() == 3.0
    assert state.embedding is not None and state.embedding.size == 1


def test_more_than_one_process_needs_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match="must be initialised"):
        ParallelState.create(Topology(2))
