"""A stretch of a flattened tensor as boxes of the tensor.

With the distributed optimizer a rank holds elements ``start`` to ``stop`` of a parameter's part,
row by row. Of a matrix that is the end of one row, some whole rows, and the beginning of another::

    . . . a a a        elements 3 to 20 of a [4, 6] matrix:
    b b b b b b        a  row 0,     columns 3-5
    b b b b b b        b  rows 1-2,  whole
    c c . . . .        c  row 3,     columns 0-1

Every further dimension can add one box at either end. Where the part is split into rectangles of
the global tensor, each box is cut along them once more.

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from megatron.mpu.shard_spec import Rectangle

Place = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A box of a tensor whose elements lie one behind the other from ``first`` on, flattened."""

    offsets: Place
    sizes: Place
    first: int


def boxes_of(shape: Place, start: int, stop: int) -> Iterator[Box]:
    """The boxes that make up elements ``start`` to ``stop`` of a flattened tensor, in order."""
    if start >= stop:
        return
    if not shape:
        yield Box((), (), 0)
        return
    row = prod(shape[1:])
    whole_from, whole_to = -(-start // row), stop // row
    if whole_from > whole_to:  # it begins and ends within one row
        yield from _within_row(shape, whole_to, start, stop)
        return
    yield from _within_row(shape, whole_from - 1, start, whole_from * row)
    if whole_to > whole_from:
        origin = (whole_from,) + (0,) * (len(shape) - 1)
        yield Box(origin, (whole_to - whole_from, *shape[1:]), whole_from * row)
    yield from _within_row(shape, whole_to, whole_to * row, stop)


def _within_row(shape: Place, index: int, start: int, stop: int) -> Iterator[Box]:
    first = index * prod(shape[1:])
    for box in boxes_of(shape[1:], start - first, stop - first):
        yield Box((index, *box.offsets), (1, *box.sizes), first + box.first)


def cut(box: Box, rectangles: Iterable[Rectangle]) -> Iterator[Rectangle]:
    """The parts of the box that lie in the rectangles; local offsets are within the box."""
    for rectangle in rectangles:
        lows = tuple(map(max, box.offsets, rectangle.local_offsets))
        highs = tuple(
            min(o + n, other + m)
            for o, n, other, m in zip(
                box.offsets, box.sizes, rectangle.local_offsets, rectangle.sizes, strict=True
            )
        )
        if all(low < high for low, high in zip(lows, highs, strict=True)):
            yield Rectangle(
                _minus(lows, box.offsets),
                _plus(rectangle.global_offsets, _minus(lows, rectangle.local_offsets)),
                _minus(highs, lows),
            )


def _plus(one: Place, other: Place) -> Place:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _minus(one: Place, other: Place) -> Place:
    return tuple(a - b for a, b in zip(one, other, strict=True))
