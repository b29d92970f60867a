"""How a parameter is split over the tensor ranks, said once.

A :class:`ShardSpec` is attached to every parameter when it is created (``param.shard_spec``).
Initialisation, the gradient norm, parameter counts, checkpoints, resharding and conversion read
it; none of them keeps a table of its own.

A split dimension is cut into equal pieces, one per tensor rank. Where one matrix holds several
things side by side, such as a gated MLP's gate and up projection, each *block* is cut by itself
and a rank holds its piece of every block::

    global rows   | gate 0 | gate 1 | up 0 | up 1 |        blocks = (2 pieces, 2 pieces)
    tensor rank 0 | gate 0 | up 0 |
    tensor rank 1 | gate 1 | up 1 |

A vocabulary is padded so that it divides evenly: ``shape`` is the true global shape, ``padded``
the padded size of the split dimension. :meth:`ShardSpec.rectangles` says which parts of a local
tensor are which parts of the global one, and leaves the padding out.

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Rectangle:
    """A box of a local tensor and the equally large box of the global tensor that it holds."""

    local_offsets: tuple[int, ...]
    global_offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def local_slices(self) -> tuple[slice, ...]:
        """Index of the box in the local tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.local_offsets, self.sizes, strict=True))

    @property
    def global_slices(self) -> tuple[slice, ...]:
        """Index of the box in the global tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.global_offsets, self.sizes, strict=True))


@dataclass(frozen=True)
class ShardSpec:
    """The global identity of a parameter and its split over the tensor ranks.

    Attributes:
        name: global name, with global layer numbers.
        shape: true global shape, without vocabulary padding.
        dim: the dimension split over the tensor ranks; None where every rank holds it whole.
        blocks: sizes of the blocks along ``dim`` that are split one by one; empty for one block.
        padded: size of ``dim`` with padding at its end; None where nothing is padded.
        tied_to: name of the parameter that this one is a copy of, on another pipeline stage.
        partial: whether a gradient still has to be summed over the tensor ranks.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    blocks: tuple[int, ...] = ()
    padded: int | None = None
    tied_to: str | None = None
    partial: bool = False

    def __post_init__(self) -> None:
        if self.dim is None:
            if self.blocks or self.padded is not None:
                raise ValueError(f"{self.name}: blocks and padding need a split dimension")
        elif sum(self._blocks) != self._padded:
            raise ValueError(f"{self.name}: blocks {self.blocks} do not add up to {self._padded}")
        elif self._padded < self.shape[self.dim]:
            raise ValueError(f"{self.name}: padded to {self.padded}, below {self.shape[self.dim]}")

    @property
    def _padded(self) -> int:
        assert self.dim is not None
        return self.shape[self.dim] if self.padded is None else self.padded

    @property
    def _blocks(self) -> tuple[int, ...]:
        return self.blocks or (self._padded,)

    @property
    def key(self) -> str:
        """The name under which the parameter's value is stored: its owner's."""
        return self.tied_to or self.name

    def counted(self, tensor_rank: int) -> bool:
        """Whether this rank's tensor counts in a norm or a parameter count.

        A split tensor counts on every rank, a whole one on tensor rank 0 alone, a copy never.
        """
        return self.tied_to is None and (self.dim is not None or tensor_rank == 0)

    def local_shape(self, size: int) -> tuple[int, ...]:
        """Shape of one rank's tensor among ``size`` tensor ranks, padding included.

        Raises:
            ValueError: a block is not divisible by ``size``.
        """
        if self.dim is None:
            return self.shape
        for block in self._blocks:
            if block % size:
                raise ValueError(
                    f"{self.name}: {block} along dimension {self.dim} is not divisible by "
                    f"tensor size {size}"
                )
        return (*self.shape[: self.dim], self._padded // size, *self.shape[self.dim + 1 :])

    def rectangles(self, rank: int, size: int) -> tuple[Rectangle, ...]:
        """The boxes of the global tensor that tensor rank ``rank`` of ``size`` holds.

        Boxes are in local order; a rank whose part is all padding has none.
        """
        if self.dim is None:
            origin = (0,) * len(self.shape)
            return (Rectangle(origin, origin, self.shape),)
        self.local_shape(size)
        return tuple(self._split_rectangles(rank, size))

    def _split_rectangles(self, rank: int, size: int) -> Iterator[Rectangle]:
        assert self.dim is not None
        dim, true_size = self.dim, self.shape[self.dim]
        local_start = block_start = 0
        for block in self._blocks:
            length = block // size
            global_start = block_start + rank * length
            real = min(length, true_size - global_start)
            if real > 0:
                yield Rectangle(
                    self._place(dim, local_start),
                    self._place(dim, global_start),
                    (*self.shape[:dim], real, *self.shape[dim + 1 :]),
                )
            local_start += length
            block_start += block

    def _place(self, dim: int, offset: int) -> tuple[int, ...]:
        return tuple(offset if d == dim else 0 for d in range(len(self.shape)))
