"""Layouts are inverse, bitwise, and work on a rank's part as on the whole."""

from __future__ import annotations

import random

import pytest
import torch

from megatron.checkpoint.name_map import (
    SAME,
    Conv1D,
    Entry,
    Heads,
    KeyValue,
    Layout,
    OurTensors,
    Stacked,
    missing,
    to_ours,
    to_theirs,
)
from megatron.errors import CheckpointError
from megatron.mpu import ShardSpec
from tests.checkpoint.hugging_face.support import DictSource
from tests.checkpoint.support import local_part, values

SIZES = (1, 2, 4)


def random_case(kind: str, rng: random.Random) -> tuple[Layout, ShardSpec, list[ShardSpec]]:
    """A layout with random sizes, how ours is split over tensor ranks, and how theirs are.

    Every size divides by all of SIZES.
    """
    size, groups, shared = rng.randint(1, 5), 4 * rng.randint(1, 2), rng.randint(1, 3)
    tail = () if rng.random() < 0.3 else (rng.randint(1, 7),)

    def rows(name: str, count: int, blocks: tuple[int, ...] = ()) -> ShardSpec:
        return ShardSpec(name, (count, *tail), dim=0, blocks=blocks)

    query, key = groups * shared * size, groups * size
    if kind == "same":
        return SAME, rows("ours", query), [rows("theirs", query)]
    if kind == "heads":
        theirs = [rows("q", query), rows("k", key), rows("v", key)]
        return Heads(size, shared), rows("ours", query + 2 * key), theirs
    if kind == "key value":
        return KeyValue(size), rows("ours", 2 * key), [rows("k", key), rows("v", key)]
    if kind == "stacked":
        fused = rows("ours", 2 * query, (query, query))
        return Stacked(), fused, [rows("gate", query), rows("up", query)]
    if kind == "conv1d":
        their = ShardSpec("theirs", (*tail, query), dim=len(tail))
        return Conv1D(), rows("ours", query), [their]
    blocks = (query, key, key)
    fused = ShardSpec("theirs", (*tail, sum(blocks)), dim=len(tail), blocks=blocks)
    return Conv1D(Heads(size, shared)), rows("ours", sum(blocks)), [fused]


KINDS = ["same", "heads", "key value", "stacked", "conv1d", "fused conv1d"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_split_and_join_are_inverse_on_wholes_and_on_parts(kind: str, seed: int) -> None:
    layout, our_spec, their_specs = random_case(kind, random.Random(seed))
    ours = values(our_spec)
    theirs = layout.split(ours)
    assert [tuple(tensor.shape) for tensor in theirs] == [spec.shape for spec in their_specs]
    assert torch.equal(layout.join(theirs), ours)
    for size in SIZES:
        for rank in range(size):
            part = local_part(ours, our_spec, rank, size)
            parts = [
                local_part(tensor, spec, rank, size)
                for tensor, spec in zip(theirs, their_specs, strict=True)
            ]
            for split, expected in zip(layout.split(part), parts, strict=True):
                assert torch.equal(split, expected)
            assert torch.equal(layout.join(parts), part)


def test_rows_of_grouped_heads() -> None:
    """[groups, queries + 2, head size]; for head size 1: q0 q1 k0 v0 q2 q3 k1 v1."""
    query, key, value = Heads(1, groups_of=2).split(torch.arange(8.0))
    assert query.tolist() == [0, 1, 4, 5]
    assert key.tolist() == [2, 6]
    assert value.tolist() == [3, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_the_tensors(kind: str) -> None:
    layout, our_spec, their_specs = random_case(kind, random.Random(7))
    entry = Entry("ours", tuple(spec.name for spec in their_specs), layout)
    shapes = [spec.shape for spec in their_specs]
    assert list(entry.shapes(our_spec.shape)) == shapes
    assert entry.shape(shapes) == our_spec.shape


def test_values_pass_through_as_bits() -> None:
    """Not-a-number, infinities, negative zero and subnormal numbers survive, in any type."""
    strange = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45, 3e38] * 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        tensor = strange.to(dtype)
        again = Heads(2, 2).join(Heads(2, 2).split(tensor))
        assert again.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()


ENTRIES = [Entry("a", ("x",)), Entry("b", ("q", "k", "v"), Heads(2))]


def test_a_map_goes_both_ways() -> None:
    ours = {"a": torch.randn(3), "b": torch.randn(12, 5)}
    theirs = dict(to_theirs(ENTRIES, ours.__getitem__))
    assert list(theirs) == ["x", "q", "k", "v"]
    back = dict(to_ours(ENTRIES, theirs.__getitem__))
    assert all(torch.equal(back[name], ours[name]) for name in ours)

    source = OurTensors(ENTRIES, DictSource(theirs))
    assert source.shapes == {"a": (3,), "b": (12, 5)}
    assert set(source.dtypes.values()) == {torch.float32}
    assert all(torch.equal(source.read(name), ours[name]) for name in ours)


def test_what_is_missing_or_does_not_fit_is_named() -> None:
    theirs = {"x": torch.zeros(3), "q": torch.zeros(4, 5), "k": torch.zeros(4, 5)}
    assert missing(ENTRIES, theirs) == ["v"]
    with pytest.raises(CheckpointError, match="1 tensors are missing: v"):
        OurTensors(ENTRIES, DictSource(theirs))
    theirs["v"] = torch.zeros(3, 5)
    with pytest.raises(CheckpointError, match=r"v \(3, 5\) do not make one b"):
        _ = OurTensors(ENTRIES, DictSource(theirs)).shapes
