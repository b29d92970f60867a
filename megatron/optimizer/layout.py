"""Where each parameter lies in a flat buffer, and how the buffer is cut into buckets.

A bucket is what one collective carries. It closes with the first parameter that fills it, so that
parameters are never cut in two and a large one may exceed the wanted size by itself. A worked
example, sizes 100, 30 and 70 with ``bucket_size`` 120, aligned to 64, buckets to 256::

    offset    0          100   128    158       256       326        512
              | param 0  |     | p 1  |         | param 2 |          |
    bucket    |<--------- 0 -------------------->|<-------- 1 ------->|

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

# Vectorised kernels start every parameter on a full vector, and a tied copy is rounded like its
# owner wherever the two lie.
ALIGNMENT = 64
# What one rank updates of a bucket is then a whole number of rows for the row-wise gradient norm.
BUCKET_MULTIPLE = 1024


@dataclass(frozen=True)
class Bucket:
    """The slice ``start:stop`` of a buffer, which holds its parameters ``first:last``."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Layout:
    """Offsets of the parameters of one buffer, its buckets, and its size, padding included."""

    starts: tuple[int, ...]
    buckets: tuple[Bucket, ...]

    @property
    def size(self) -> int:
        """Elements of the whole buffer."""
        return self.buckets[-1].stop


def lay_out(
    sizes: Sequence[int],
    bucket_size: int,
    *,
    alignment: int = ALIGNMENT,
    bucket_multiple: int = BUCKET_MULTIPLE,
    one_place: bool = False,
) -> Layout:
    """Place parameters of ``sizes`` elements one after the other in buckets of ``bucket_size``.

    ``sizes`` must not be empty; ``bucket_multiple`` must be a multiple of ``alignment``. With
    ``one_place`` all of them, being equally large, lie in the same place.
    """
    if one_place:
        stop = _round_up(sizes[0], bucket_multiple)
        return Layout((0,) * len(sizes), (Bucket(0, stop, 0, len(sizes)),))
    starts: list[int] = []
    buckets: list[Bucket] = []
    start = first = offset = 0
    for index, size in enumerate(sizes):
        offset = _round_up(offset, alignment)
        starts.append(offset)
        offset += size
        if offset - start >= bucket_size or index == len(sizes) - 1:
            offset = _round_up(offset, bucket_multiple)
            buckets.append(Bucket(start, offset, first, index + 1))
            start, first = offset, index + 1
    return Layout(tuple(starts), tuple(buckets))


def _round_up(number: int, multiple: int) -> int:
    return ceil(number / multiple) * multiple
