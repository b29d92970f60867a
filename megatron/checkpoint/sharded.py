"""One rank's part of a global tensor, as torch.distributed.checkpoint (DCP) understands it.

A checkpoint holds global tensors under global names. A rank offers the *pieces* of a global tensor
that it holds: each is a box of the global tensor and a view of this rank's memory. DCP does the
rest. Saving, it writes every box once, whichever of its holders has the least to write. Loading,
it intersects the boxes that are wanted with those that were written, and copies into the views.

A worked example: a vocabulary of 10 rows padded to 12, split over 4 tensor ranks of 3 rows. Rank 1
offers rows 3-5; rank 3 holds row 9 and two rows of padding, and offers row 9 alone. With a
vocabulary of 9, rank 3 offers nothing. Loaded by 2 ranks of 6 rows, rank 1 asks for rows 6-9 and
reads them from what ranks 2 and 3 wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron.checkpoint.intervals import boxes_of, cut
from megatron.mpu.shard_spec import ShardSpec


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor: its origin there, and the view of local memory that holds it."""

    offsets: tuple[int, ...]
    view: torch.Tensor


class GlobalTensor(torch.Tensor):
    """A global tensor of which this rank holds some pieces.

    It has the global shape and no memory of its own; only DCP reads it, through the three methods
    that it looks for on whatever is in a state dict. It has to be a `torch.Tensor`, because DCP
    takes any other object for something to pickle.
    """

    pieces: tuple[Piece, ...]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(f"{func} on a GlobalTensor, which has no memory of its own")

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        pieces: Iterable[Piece],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> GlobalTensor:
        tensor: GlobalTensor = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device
        )
        tensor.pieces = tuple(piece for piece in pieces if piece.view.numel())
        return tensor

    @classmethod
    def of(cls, tensor: torch.Tensor, spec: ShardSpec, rank: int, size: int) -> GlobalTensor:
        """The global tensor of which `tensor` is the part of tensor rank `rank` of `size`."""
        local = tensor.detach()
        expected = spec.local_shape(size)
        assert tuple(local.shape) == expected, f"{spec.name}: {tuple(local.shape)} != {expected}"
        pieces = (
            Piece(box.global_offsets, local[box.local_slices])
            for box in spec.rectangles(rank, size)
        )
        return cls(spec.shape, pieces, dtype=local.dtype, device=local.device)

    @classmethod
    def of_stretch(
        cls, part: torch.Tensor, first: int, spec: ShardSpec, rank: int, size: int
    ) -> GlobalTensor:
        """The same where only `part` [n], from element `first` of the flattened part on, is held.

        It may be empty.
        """
        flat = part.detach()
        rectangles = spec.rectangles(rank, size)
        pieces = []
        for box in boxes_of(spec.local_shape(size), first, first + flat.numel()):
            start = box.first - first
            held = flat[start : start + prod(box.sizes)].view(box.sizes)
            for own in cut(box, rectangles):
                pieces.append(Piece(own.global_offsets, held[own.local_slices]))
        return cls(spec.shape, pieces, dtype=flat.dtype, device=flat.device)

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> GlobalTensor:
        """A global tensor that this rank holds entirely."""
        piece = Piece((0,) * tensor.dim(), tensor.detach())
        return cls(tensor.shape, (piece,), dtype=tensor.dtype, device=tensor.device)

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        """What there is to write; DCP drops the boxes that another rank writes already."""
        return [
            WriteItem(
                index=MetadataIndex(fqn, piece.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(piece),
                    properties=TensorProperties.create_from_tensor(piece.view),
                    size=torch.Size(self.shape),
                ),
            )
            for piece in self.pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """The boxes that are to be read."""
        return [_chunk(piece) for piece in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        """The memory of the box at `index.offset`, to write from or to read into."""
        assert index.offset is not None
        return next(p.view for p in self.pieces if p.offsets == tuple(index.offset))


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), piece.view.shape)
