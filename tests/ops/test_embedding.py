"""However rows are added to a table, it is the sum that it should be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.ops import embedding
from megatron.ops.embedding import FEW, PIECE, add_by_product, add_in_pieces, add_rows

Adder = Callable[[Tensor, Tensor, Tensor], None]
ADDERS = (add_rows, add_by_product, add_in_pieces)


def _draw(n: int, v: int, h: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Most of them are one id, as padding may be.
    ids = torch.randint(v, (n,), generator=generator)
    ids[torch.rand(n, generator=generator) < 0.7] = v // 2
    return (
        torch.randn(v, h, generator=generator),
        ids,
        torch.randn(n, h, generator=generator),
    )


@pytest.mark.parametrize("add", ADDERS)
@pytest.mark.parametrize("n", [0, 1, PIECE, 10 * PIECE + 3])
@pytest.mark.parametrize("v", [1, FEW, 1000])
def test_each_id_gets_the_sum_of_its_rows(add: Adder, n: int, v: int) -> None:
    table, ids, rows = (x if x.dtype == torch.int64 else x.double() for x in _draw(n, v, 6))
    expected = table.clone()
    for index, row in zip(ids.tolist(), rows, strict=True):
        expected[index] += row
    add(table, ids, rows)
    torch.testing.assert_close(table, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("add", ADDERS)
def test_half_precision_is_added_up_in_the_table_s(add: Adder) -> None:
    table, ids, rows = _draw(3000, 40, 6)
    exact = table.double().index_add(0, ids, rows.bfloat16().double())
    add(table, ids, rows.bfloat16())
    tolerance = 1e-2 if add is add_by_product else 1e-5  # the CPU rounds a product
    torch.testing.assert_close(table.double(), exact, rtol=tolerance, atol=100 * tolerance)


def test_no_piece_is_longer_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    longest: list[int] = []
    table, ids, rows = _draw(500, 100, 2)
    add_at = embedding._add_at

    def watched(total: Tensor, places: Tensor, values: Tensor) -> None:
        longest.append(int(places.bincount().max()))
        add_at(total, places, values)

    monkeypatch.setattr(embedding, "_add_at", watched)
    add_in_pieces(table, ids, rows)
    most = int(ids.bincount().max())
    assert longest[0] == PIECE
    assert longest[1] <= math.ceil(most / PIECE) + math.ceil(len(ids) / len(table))
