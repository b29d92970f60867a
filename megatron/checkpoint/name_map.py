"""One map between our tensors and those of another system, read in either direction.

A map is a list of `Entry`s: one of our global tensors, and the names of theirs that hold the same
numbers. Most tensors are renamed and nothing else. Where the rows of ours are made of several of
theirs, a `Layout` says how::

    Heads, 4 heads in groups of 2     q0 q1 k0 v0 q2 q3 k1 v1   ours, one matrix of rows
                                      q0 q1 q2 q3 | k0 k1 | v0 v1   theirs, three

The rows of a group of heads stand together in ours, so that a tensor rank's share of them is one
block of rows. That is why a layout works on a rank's part as it does on the whole: a part of ours
becomes the parts of theirs that belong to the same heads.

Values are moved and never computed with, so that a round trip returns the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Protocol

import torch

from megatron.checkpoint.tensor_source import TensorSource
from megatron.errors import CheckpointError

Read = Callable[[str], torch.Tensor]
Shape = tuple[int, ...]


class Layout(Protocol):
    """How one of our tensors, or a tensor rank's part of it, is made of theirs."""

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Their tensors, made from ours."""
        ...

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Our tensor, made from theirs."""
        ...


@dataclass(frozen=True)
class Same:
    """One tensor on either side."""

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Layout`."""
        return (ours,)

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `Layout`."""
        (tensor,) = theirs
        return tensor


SAME = Same()


@dataclass(frozen=True)
class Heads:
    """Query, key and value of self-attention; ours has rows [groups, queries + 2, head size].

    groups_of: query heads that share a key and a value.
    """

    head_size: int
    groups_of: int = 1

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Layout`."""
        rows = ours.unflatten(0, (-1, self.groups_of + 2, self.head_size))
        parts = rows.split((self.groups_of, 1, 1), dim=1)
        return tuple(part.flatten(0, 2) for part in parts)

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `Layout`."""
        sizes = zip(theirs, (self.groups_of, 1, 1), strict=True)
        parts = [part.unflatten(0, (-1, size, self.head_size)) for part, size in sizes]
        return torch.cat(parts, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class KeyValue:
    """Key and value of cross attention; ours has rows [heads, 2, head size]."""

    head_size: int

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Layout`."""
        parts = ours.unflatten(0, (-1, 2, self.head_size)).unbind(1)
        return tuple(part.flatten(0, 1) for part in parts)

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `Layout`."""
        key, value = (part.unflatten(0, (-1, self.head_size)) for part in theirs)
        return torch.stack((key, value), dim=1).flatten(0, 2)


@dataclass(frozen=True)
class Stacked:
    """`count` equal tensors, one below the other: a gated MLP's gate and what it multiplies."""

    count: int = 2

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Layout`."""
        return ours.unflatten(0, (self.count, -1)).unbind(0)

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `Layout`."""
        return torch.stack(tuple(theirs), dim=0).flatten(0, 1)


@dataclass(frozen=True)
class Conv1D:
    """One tensor of theirs with its columns as our rows; those may be made of parts by `inner`.

    Theirs has the parts, each whole, side by side.
    """

    inner: Layout = SAME

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `Layout`."""
        return (_transposed(torch.cat(self.inner.split(ours))),)

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See `Layout`."""
        (tensor,) = theirs
        rows = _transposed(tensor)
        # How large each part is follows from how a tensor of as many rows is split.
        sizes = [len(part) for part in self.inner.split(rows)]
        return self.inner.join(rows.split(sizes))


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t() if tensor.dim() == 2 else tensor


@dataclass(frozen=True)
class Entry:
    """One of our tensors and those of theirs that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Their tensors, in the order of `theirs`, made from ours or from a rank's part of it."""
        return self.layout.split(ours)

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Our tensor or a rank's part of it, made from theirs."""
        return self.layout.join(theirs)

    def shapes(self, ours: Shape) -> tuple[Shape, ...]:
        """Their shapes, made from ours."""
        return tuple(tuple(part.shape) for part in self.split(torch.empty(ours, device="meta")))

    def shape(self, theirs: Sequence[Shape]) -> Shape:
        """Our shape, made from theirs.

        Raises:
            CheckpointError: shapes that do not go together.
        """
        try:
            joined = self.join([torch.empty(shape, device="meta") for shape in theirs])
        except (RuntimeError, ValueError) as error:
            found = ", ".join(f"{n} {s}" for n, s in zip(self.theirs, theirs, strict=True))
            raise CheckpointError(f"{found} do not make one {self.ours}") from error
        return tuple(joined.shape)


def to_theirs(entries: Iterable[Entry], read: Read) -> Iterator[tuple[str, torch.Tensor]]:
    """Their names and tensors, one of ours read at a time."""
    for entry in entries:
        yield from zip(entry.theirs, entry.split(read(entry.ours)), strict=True)


def to_ours(entries: Iterable[Entry], read: Read) -> Iterator[tuple[str, torch.Tensor]]:
    """Our names and tensors, those of theirs that make one of ours read at a time."""
    for entry in entries:
        yield entry.ours, entry.join([read(name) for name in entry.theirs])


def missing(entries: Iterable[Entry], names: Collection[str]) -> list[str]:
    """Names of theirs that the map needs and that are not there."""
    return [name for entry in entries for name in entry.theirs if name not in names]


def unknown(entries: Iterable[Entry], names: Iterable[str]) -> list[str]:
    """Names of theirs that the map does not speak of."""
    known = {name for entry in entries for name in entry.theirs}
    return [name for name in names if name not in known]


class OurTensors:
    """A `TensorSource` in our names, over one in theirs.

    Raises:
        CheckpointError: tensors are missing there, or their shapes do not go together.
    """

    def __init__(self, entries: Iterable[Entry], source: TensorSource) -> None:
        self._entries = {entry.ours: entry for entry in entries}
        self._source = source
        absent = missing(self._entries.values(), source.shapes)
        if absent:
            raise CheckpointError(f"{len(absent)} tensors are missing: {', '.join(absent[:5])}")

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """The global shape of each tensor."""
        theirs = self._source.shapes
        return {
            name: entry.shape([theirs[their] for their in entry.theirs])
            for name, entry in self._entries.items()
        }

    @cached_property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The type of each tensor; of one that is made of several, what holds all their values."""
        theirs = self._source.dtypes
        return {
            name: reduce(torch.promote_types, (theirs[part] for part in entry.theirs))
            for name, entry in self._entries.items()
        }

    def expect_floating(self) -> None:
        """Raise CheckpointError where values are whole numbers, codes perhaps of others."""
        for name, dtype in self.dtypes.items():
            if not dtype.is_floating_point:
                theirs = self._entries[name].theirs[0]
                raise CheckpointError(f"{theirs} is of {dtype}, expected a floating type")

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, in this process' memory."""
        entry = self._entries[name]
        return entry.join([self._source.read(their) for their in entry.theirs])
