"""Buckets: slices of the flat buffers, each carried by one collective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from megatron.mpu.parallel_state import Axis
from megatron.optimizer.flat_buffer import FlatBuffer, Shard


@dataclass(eq=False)
class Bucket:
    """The slice ``start:stop`` of a buffer, which holds its parameters ``first:last``.

    ``places`` are where the parameters lie within the bucket.
    """

    buffer: FlatBuffer
    start: int
    stop: int
    first: int
    last: int
    places: dict[nn.Parameter, int] = field(init=False)

    def __post_init__(self) -> None:
        starts = self.buffer.layout.starts[self.first : self.last]
        parameters = self.buffer.parameters[self.first : self.last]
        self.places = {p: s - self.start for p, s in zip(parameters, starts, strict=True)}

    @property
    def size(self) -> int:
        """Elements, padding included."""
        return self.stop - self.start

    @property
    def values(self) -> Tensor:
        """The parameters' elements, [size]."""
        return self.buffer.values[self.start : self.stop]

    def own(self, flat: Tensor, axis: Axis) -> Tensor:
        """This rank's part of a tensor laid out like the bucket."""
        return flat.chunk(axis.size)[axis.rank]

    def shard(self, gradients: Tensor, axis: Axis) -> Shard:
        """The part that this rank updates, of which ``gradients`` are the gradients."""
        start = self.start + axis.rank * (self.size // axis.size)
        return Shard(self.buffer, start, gradients, self.first, self.last)


def cut_into_buckets(
    buffers: Sequence[FlatBuffer], backward_order: Sequence[nn.Parameter]
) -> list[Bucket]:
    """The buckets of all buffers in the order in which backward should complete them."""
    place = {parameter: index for index, parameter in enumerate(backward_order)}
    buckets = [
        Bucket(buffer, cut.start, cut.stop, cut.first, cut.last)
        for buffer in buffers
        for cut in buffer.layout.buckets
    ]
    return sorted(buckets, key=lambda bucket: max(place[p] for p in bucket.places))
