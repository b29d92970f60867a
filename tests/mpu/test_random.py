"""Dropout streams: the same on all tensor ranks outside the split region, different inside."""

from __future__ import annotations

import torch

from megatron.mpu import ParallelState, Topology
from tests.distributed import run_distributed


def _draw(state: ParallelState, split: bool) -> list[float]:
    if split:
        with state.streams.split_region():
            return torch.rand(4).tolist()
    return torch.rand(4).tolist()


def _draws(tensor: int, pipeline: int) -> dict[str, list[float]]:
    world = torch.distributed.get_world_size()
    state = ParallelState.create(Topology(world, tensor=tensor, pipeline=pipeline))
    result = {}
    for step, micro_batch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        state.streams.start(1234, step, micro_batch)
        for part in ("first", "second"):
            for split in (False, True):
                key = f"{step}.{micro_batch} {part} {'split' if split else 'common'}"
                values = _draw(state, split)
                assert result.setdefault(key, values) == values, "a repeated pass draws the same"
    result["place"] = [state.pipeline.rank, state.data.rank, state.tensor.rank]
    return result


def test_streams_of_eight_ranks() -> None:
    ranks = run_distributed(8, _draws, 2, 2)
    keys = [key for key in ranks[0] if key != "place"]
    for key in keys:
        groups: dict[tuple[float, ...], set[tuple[float, ...]]] = {}
        for rank in ranks:
            pipeline, data, tensor = rank["place"]
            shared = (pipeline, data) if "common" in key else (pipeline, data, tensor)
            groups.setdefault(shared, set()).add(tuple(rank[key]))
        assert all(len(values) == 1 for values in groups.values())
        assert len({next(iter(values)) for values in groups.values()}) == len(groups)
    for rank in ranks:
        assert len({tuple(rank[key]) for key in keys}) == len(keys)


def test_a_single_rank_has_one_stream() -> None:
    state = ParallelState.single()
    state.streams.start(1, 0, 0)
    first = _draw(state, False) + _draw(state, True)
    state.streams.start(1, 0, 0)
    assert first == _draw(state, True) + _draw(state, False)


def test_seeds_matter() -> None:
    state = ParallelState.single()
    state.streams.start(1, 0, 0)
    first = _draw(state, False)
    state.streams.start(2, 0, 0)
    assert first != _draw(state, False)
