"""Shard specs: the boxes of all ranks tile the global tensor, whatever the split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.mpu import ShardSpec


@st.composite
def split_specs(draw: st.DrawFn) -> tuple[ShardSpec, int]:
    """A spec split over a number of tensor ranks, padded or in blocks or neither."""
    size = draw(st.integers(1, 5))
    rank = draw(st.integers(1, 3))
    dim = draw(st.integers(0, rank - 1))
    shape = draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    blocks = [n * size for n in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))]
    padding = draw(st.integers(0, sum(blocks) - 1))
    shape[dim] = sum(blocks) - padding
    spec = ShardSpec("w", tuple(shape), dim=dim, blocks=tuple(blocks), padded=sum(blocks))
    return spec, size


@given(split_specs())
def test_boxes_tile_the_global_tensor(case: tuple[ShardSpec, int]) -> None:
    spec, size = case
    covered = torch.zeros(spec.shape, dtype=torch.int64)
    for rank in range(size):
        local = torch.zeros(spec.local_shape(size), dtype=torch.int64)
        for box in spec.rectangles(rank, size):
            assert all(n > 0 for n in box.sizes)
            covered[box.global_slices] += 1
            local[box.local_slices] += 1
            assert local[box.local_slices].shape == covered[box.global_slices].shape
        assert local.max() <= 1
    assert bool((covered == 1).all())


@given(split_specs())
def test_a_rank_holds_its_piece_of_every_block(case: tuple[ShardSpec, int]) -> None:
    spec, size = case
    assert spec.dim is not None
    padded = list(spec.shape)
    padded[spec.dim] = sum(spec.blocks)
    whole = torch.arange(1, torch.Size(padded).numel() + 1).view(padded)
    for rank in range(size):
        pieces = [
            block.chunk(size, dim=spec.dim)[rank]
            for block in whole.split(list(spec.blocks), dim=spec.dim)
        ]
        expected = torch.cat(pieces, dim=spec.dim)
        local = torch.zeros_like(expected)
        for box in spec.rectangles(rank, size):
            local[box.local_slices] = whole[box.global_slices]
        real = expected * (local != 0)
        assert torch.equal(local, real)
        # What is missing is the padding, behind the true size, and nothing else.
        true = whole.narrow(spec.dim, 0, spec.shape[spec.dim]).contiguous()
        assert torch.isin(expected[local == 0].contiguous(), true).sum() == 0


def test_whole_parameters_have_one_box_and_count_once() -> None:
    spec = ShardSpec("norm.weight", (7,))
    (box,) = spec.rectangles(3, 4)
    assert (box.local_offsets, box.global_offsets, box.sizes) == ((0,), (0,), (7,))
    assert [spec.counted(rank) for rank in range(4)] == [True, False, False, False]
    assert all(ShardSpec("w", (8,), dim=0).counted(rank) for rank in range(4))


def test_a_copy_is_stored_under_its_owner_and_never_counted() -> None:
    spec = ShardSpec("copy", (8, 2), dim=0, tied_to="owner")
    assert spec.key == "owner"
    assert not any(spec.counted(rank) for rank in range(4))


def test_a_rank_of_padding_alone_holds_nothing() -> None:
    spec = ShardSpec("e", (3, 2), dim=0, padded=8)
    assert [len(spec.rectangles(rank, 4)) for rank in range(4)] == [1, 1, 0, 0]
    assert spec.rectangles(1, 4)[0].sizes == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (4,), "blocks": (2, 2)}, "need a split dimension"),
        ({"shape": (4,), "dim": 0, "blocks": (2, 3)}, r"blocks \(2, 3\) do not add up to 4"),
        ({"shape": (4,), "dim": 0, "padded": 3}, "padded to 3, below 4"),
    ],
)
def test_contradictions_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardSpec("w", **arguments)  # type: ignore[arg-type]


def test_indivisible_blocks_are_refused() -> None:
    with pytest.raises(
        ValueError, match="w: 6 along dimension 0 is not divisible by tensor size 4"
    ):
        ShardSpec("w", (6,), dim=0).local_shape(4)
