"""The gradient of an embedding, added into the table's: total[id_i] += row_i for every i.

On the CPU that is one pass in order. On a GPU many rows may want the same place, and atomic
additions would give other bits each time. PyTorch's deterministic way sorts the ids and has one
warp add up all rows of an id, one after the other: slow where an id occurs thousands of times, as
padding, a mask token and every token type do. Therefore

    few ids    the table's gradient is a product with the one-hot matrix of the ids
    many ids   the rows of an id are added up in pieces of `PIECE`, then the pieces

Neither waits for the device, and both give the same bits each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops.matmul import add_product
from megatron.ops.planned import device_type

FEW = 64  # rows of a table: types of tokens, ranges of distances
PIECE = 32


def add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Add ``rows`` [n, h] to the rows ``ids`` i64[n] of ``total`` [v, h], which may be wider."""
    if device_type(total) == "cpu":
        total.index_add_(0, ids, rows.to(total.dtype))
    elif total.size(0) <= FEW:
        add_by_product(total, ids, rows)
    else:
        add_in_pieces(total, ids, rows)


def add_by_product(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """As `add_rows`, for a table of few rows."""
    one_hot = torch.arange(total.size(0), device=ids.device)[:, None] == ids
    add_product(total, one_hot.to(rows.dtype), rows)


def add_in_pieces(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """As `add_rows`, for a table of many rows of which some are asked for again and again."""
    ids, order = ids.sort(stable=True)
    numbers = torch.arange(ids.numel(), device=ids.device)
    # How often the same id came before: all of its rows lie one behind the other now.
    before = numbers - torch.searchsorted(ids, ids)
    piece = (before % PIECE == 0).cumsum(0) - 1
    sums = torch.zeros(rows.shape, dtype=total.dtype, device=total.device)
    _add_at(sums, piece, rows[order].to(total.dtype))
    # There are at most as many pieces as rows. What is left over adds zeros, to many places.
    place = (numbers % total.size(0)).scatter_(0, piece, ids)
    _add_at(total, place, sums)


def _add_at(total: Tensor, places: Tensor, rows: Tensor) -> None:
    # The places are right, or the forward pass had failed: they are not looked at once more.
    torch._index_put_impl_(total, (places,), rows, accumulate=True, unsafe=True)
