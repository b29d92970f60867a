"""A micro-batch's real tokens, one sample behind the other in a single row: no work on padding.

Two samples of 3 and 5 tokens, padded to 8 each, become one row instead of 16 tokens:

    a0 a1 a2 b0 b1 b2 b3 b4        positions 0 1 2 0 1 2 3 4        documents of 3 and 5

A sample is a document of the row, and attention stays within it. What is missing to a length from
a coarse grid, so that few lengths occur, is a last document that nobody looks at. All of it is made
on the host, where the lengths are known.

Letters: s sequence, b micro-batch, r row, k masked positions of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 64


@dataclass(frozen=True)
class Packing:
    """How the samples lie in the row.

    Attributes:
        position_ids: i64[1, r], each token's place in its own sample.
        first_tokens: i64[b], where each sample begins.
        document_lengths: i64[1, b + 1] on the host, the samples' and the rest's.
    """

    position_ids: Tensor
    first_tokens: Tensor
    document_lengths: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """What BERT reads of a packed micro-batch.

    Attributes:
        input_ids, tokentype_ids: i64[1, r].
        masked_positions: i64[b, k], places in the row.
    """

    input_ids: Tensor
    tokentype_ids: Tensor
    masked_positions: Tensor
    packing: Packing


def pack(
    input_ids: Tensor,
    tokentype_ids: Tensor,
    attention_mask: Tensor,
    masked_positions: Tensor,
    *,
    multiple: int = GRID,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """The samples of a micro-batch, which are on the host, packed into a row on `device`.

    Args:
        input_ids, tokentype_ids: i64[b, s].
        attention_mask: bool[b, s], True where a token is real, as the first of each sample is.
        masked_positions: i64[b, k], places in the samples.
        multiple: what the row's length is to be divisible by.
    """
    assert bool(attention_mask[:, 0].all())
    real = attention_mask.flatten()
    places = (real.cumsum(0) - 1).view_as(attention_mask)  # of each real token in the row
    lengths = attention_mask.sum(dim=1)
    rest = -int(lengths.sum()) % multiple
    positions = torch.arange(attention_mask.size(1)).expand_as(attention_mask)
    tokens = [
        F.pad(each[attention_mask], (0, rest)) for each in (input_ids, tokentype_ids, positions)
    ]
    masked = places.gather(1, masked_positions)
    on_device = _sent(device, *(each[None] for each in tokens), masked, places[:, 0])
    ids, types, position_ids, masked, first_tokens = on_device
    document_lengths = F.pad(lengths, (0, 1), value=rest)[None]
    return PackedBatch(ids, types, masked, Packing(position_ids, first_tokens, document_lengths))


def _sent(device: torch.device | str, *tensors: Tensor) -> list[Tensor]:
    """The tensors on the device, by way of a single copy that the host does not wait for."""
    if torch.device(device).type == "cpu":
        return list(tensors)
    together = torch.cat([each.flatten() for each in tensors]).pin_memory()
    parts = together.to(device, non_blocking=True).split([each.numel() for each in tensors])
    return [part.view(each.shape) for part, each in zip(parts, tensors, strict=True)]
