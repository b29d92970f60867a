"""Dropout streams: the same on all tensor ranks outside the split region, different inside."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from megatron.mpu import Coordinates, ParallelState, Topology
from megatron.mpu.random import RandomStreams
from megatron.ops.philox import Draw
from tests.distributed import run_distributed


def _draw(state: ParallelState, split: bool) -> list[float]:
    """Four numbers of the generator, and which counter-based draw comes next."""
    with state.streams.split_region() if split else nullcontext():
        return [*torch.rand(4).tolist(), *_place(state.streams.draw())]


def _place(draw: Draw) -> tuple[int, int]:
    return int(draw.key), draw.number


def _draws(tensor: int, pipeline: int) -> dict[str, list[float]]:
    world = torch.distributed.get_world_size()
    state = ParallelState.create(Topology(world, tensor=tensor, pipeline=pipeline))
    result: dict[str, list[float]] = {}
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
        firsts = [next(iter(values)) for values in groups.values()]
        assert len({first[:4] for first in firsts}) == len(groups)
        assert len({first[4:] for first in firsts}) == len(groups)
    for rank in ranks:
        assert len({tuple(rank[key][:4]) for key in keys}) == len(keys)
        assert len({tuple(rank[key][4:]) for key in keys}) == len(keys)


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


def test_draws_of_a_stream_are_counted_from_each_start() -> None:
    streams = ParallelState.single().streams
    streams.start(1, 0, 0)
    first = [streams.draw() for _ in range(3)]
    assert [draw.number for draw in first] == [0, 1, 2]
    assert all(draw.key is first[0].key for draw in first), "one tensor for a start and stream"
    streams.start(1, 0, 1)
    other = streams.draw()
    assert other.number == 0 and int(other.key) != int(first[0].key)
    streams.start(1, 0, 0)
    assert [_place(streams.draw()) for _ in range(3)] == [_place(draw) for draw in first]


def test_keys_are_not_the_seeds_of_the_generator() -> None:
    streams = ParallelState.single().streams
    streams.start(1, 0, 0)
    assert int(streams.draw().key) != torch.initial_seed()


def test_a_replay_takes_the_same_draws_and_leaves_the_count() -> None:
    streams = _with_two_streams(tensor_rank=0)
    streams.start(1, 0, 0)
    _both(streams)
    snapshot = streams.snapshot()
    drawn = _both(streams)
    with streams.replayed(snapshot):
        assert _both(streams) == drawn
    after = _both(streams)
    streams.start(1, 0, 0)
    assert [_both(streams) for _ in range(3)][1:] == [drawn, after]


def test_without_a_start_draws_follow_the_users_seed() -> None:
    found: dict[tuple[int, int], list[list[tuple[int, int]]]] = {}
    for seed in (5, 6, 5):
        for rank in range(2):
            streams = _with_two_streams(rank)
            torch.manual_seed(seed)
            snapshot = streams.snapshot()
            drawn = [_both(streams), _both(streams)]
            assert found.setdefault((seed, rank), drawn) == drawn
            with streams.replayed(snapshot):
                assert [_both(streams), _both(streams)] == drawn
    assert len({place for drawn in found.values() for both in drawn for place in both}) == 12
    for seed in (5, 6):
        for one, other in zip(found[seed, 0], found[seed, 1], strict=True):
            assert one[0] == other[0] and one[1] != other[1]


def test_static_keys_are_written_in_place() -> None:
    streams, plain = _with_two_streams(tensor_rank=1), _with_two_streams(tensor_rank=1)
    streams.static_keys = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for micro_batch in range(2):
        streams.start(1, 0, micro_batch)
        plain.start(1, 0, micro_batch)
        assert _both(streams) == _both(plain)
        with streams.split_region():
            split = streams.draw()
        assert streams.draw().key is streams.static_keys[0]
        assert split.key is streams.static_keys[1]


def _with_two_streams(tensor_rank: int) -> RandomStreams:
    """Those of a tensor rank of two."""
    place = Coordinates(pipeline=0, data=0, tensor=tensor_rank)
    return RandomStreams(place, 2, torch.device("cpu"))


def _both(streams: RandomStreams) -> list[tuple[int, int]]:
    """The next draws, of the common and of the split stream."""
    common = _place(streams.draw())
    with streams.split_region():
        return [common, _place(streams.draw())]
