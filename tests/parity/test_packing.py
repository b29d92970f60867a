"""Packed samples train the same model as padded ones: losses, norms, gradients and weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.parity.runs import TOLERANCES, Case, compare, train


@pytest.mark.parametrize(
    "case",
    [
        Case.of(ranks=2, micro_batch_size=4),
        Case.of(
            "bert, norms behind",
            ranks=2,
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            recompute_granularity="full",
        ),
    ],
    ids=str,
)
def test_packing_changes_nothing(case: Case) -> None:
    expected = train(case.on_one_process())
    packed = train(case.with_flags(pack_sequences=True))
    # The layers' outputs are of another shape.
    packed = replace(packed, outputs=expected.outputs)
    for row in compare(packed, expected, TOLERANCES["fp64"]):
        assert row.agrees, f"{row.quantity}, {row.where}: differs by {row.difference:.2e}"
