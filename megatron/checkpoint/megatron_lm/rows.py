"""The order of the rows of fused projections in the versions of Megatron-LM's checkpoints.

A tensor rank holds whole heads: n of them, and for each the c = 3 parts of `query_key_value`
(query, key, value) or the c = 2 parts of a cross attention's `key_value`, of d rows each::

    version 0        [c, n, d]    all queries, then all keys, then all values
    version 1        [n, d, c]    the rows of the parts alternate
    version 2 and 3  [n, c, d]    head by head, as here

The order holds for each rank by itself, so that ranks are put in our order before they are joined.
"""

from __future__ import annotations

from torch import Tensor

VERSIONS = (0, 1, 2, 3)

# Fused projections by the end of their names, and how many parts of a head they hold.
_PARTS = {"query_key_value": 3, "key_value": 2}


def parts_of(name: str) -> int | None:
    """How many parts of each head the rows of the tensor hold; None where nothing is fused."""
    module = name.split(".")[-2:][0]
    return _PARTS.get(module)


def to_ours(rows: Tensor, parts: int, head_size: int, version: int) -> Tensor:
    """A rank's rows in the order [n, parts, d], from those of a checkpoint of `version`."""
    if version == 0:
        return rows.unflatten(0, (parts, -1, head_size)).transpose(0, 1).flatten(0, 2)
    if version == 1:
        return rows.unflatten(0, (-1, head_size, parts)).transpose(1, 2).flatten(0, 2)
    return rows


def to_theirs(rows: Tensor, parts: int, head_size: int, version: int) -> Tensor:
    """A rank's rows in the order of a checkpoint of `version`, from [n, parts, d]."""
    if version >= 2:
        return rows
    heads = rows.unflatten(0, (-1, parts, head_size))  # [n, parts, d]
    return (heads.transpose(0, 1) if version == 0 else heads.transpose(1, 2)).flatten(0, 2)
