"""A stretch of a flattened tensor, cut into boxes, is that stretch and nothing else."""

from __future__ import annotations

import random
from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.checkpoint.intervals import Box, boxes_of
from megatron.checkpoint.sharded import GlobalTensor
from tests.checkpoint.support import random_spec, values

shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


def test_worked_example() -> None:
    assert list(boxes_of((4, 6), 3, 20)) == [
        Box((0, 3), (1, 3), 3),
        Box((1, 0), (2, 6), 6),
        Box((3, 0), (1, 2), 18),
    ]


@given(shapes, st.data())
def test_boxes_are_the_stretch_in_its_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    elements = torch.arange(size).view(shape)
    boxes = list(boxes_of(shape, start, stop))
    found = []
    for box in boxes:
        assert box.first == start + len(found)
        slices = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
        found += elements[slices].flatten().tolist()
    assert found == list(range(start, stop))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


@given(st.integers(0, 10_000))
def test_stretches_of_all_ranks_cover_the_global_tensor_once(seed: int) -> None:
    rng = random.Random(seed)
    spec = random_spec("weight", rng, multiple=4)
    whole = values(spec)
    covered = torch.zeros(spec.shape, dtype=torch.long)
    for rank in range(4):
        local = torch.full(spec.local_shape(4), torch.nan)
        for box in spec.rectangles(rank, 4):
            local[box.local_slices] = whole[box.global_slices]
        flat = local.flatten()
        cuts = sorted(rng.randint(0, flat.numel()) for _ in range(3))
        for first, last in zip([0, *cuts], [*cuts, flat.numel()], strict=True):
            held = GlobalTensor.of_stretch(flat[first:last], first, spec, rank, 4)
            assert tuple(held.shape) == spec.shape
            for piece in held.pieces:
                sizes = piece.view.shape
                slices = tuple(slice(o, o + n) for o, n in zip(piece.offsets, sizes, strict=True))
                covered[slices] += 1
                assert torch.equal(whole[slices], piece.view)
    assert (covered == (4 if spec.dim is None else 1)).all()
