"""Rung 2 of the parity ladder: any layout trains the same model as one process.

Losses, gradient norms, first gradients and all weights after ten steps, dropout off, within 1e-11
in float64 and 1e-5 in float32, relative. Layouts are drawn at random: here a few of them,
`python -m tests.parity.full` runs as many as one likes.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.parity.layouts import draw_case
from tests.parity.runs import (
    TOLERANCES,
    Case,
    assert_equals_one_process,
    compare,
    train,
)

SEED = int(os.environ.get("PARITY_SEED", "1"))
DRAWN = int(os.environ.get("PARITY_LAYOUTS", "16"))


def _drawn() -> list[Case]:
    draw = random.Random(SEED)
    return [draw_case(draw) for _ in range(DRAWN)]


@pytest.mark.parametrize("case", _drawn(), ids=lambda case: f"seed {SEED}, {case}")
def test_a_drawn_layout_equals_one_process(case: Case) -> None:
    assert_equals_one_process(case)


EVERYTHING_OF_BERT = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "pipeline_layers": (1, 4),
    "micro_batch_size": 1,
}


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize(
    "case",
    [
        Case.of(micro_batch_size=1),
        Case.of(micro_batch_size=8),
        Case.of(
            ranks=4,
            pipeline_model_parallel_size=4,
            pipeline_layers=(0, 2, 3, 0),
            pipeline_schedule="gpipe",
        ),
        Case.of(ranks=8, **EVERYTHING_OF_BERT),
        # A stage in the middle without layers holds no parameter at all.
        Case.of(
            ranks=6,
            pipeline_model_parallel_size=3,
            pipeline_layers=(2, 0, 3),
            pipeline_schedule="zb-h1",
            use_distributed_optimizer=True,
            micro_batch_size=1,
        ),
    ],
    ids=str,
)
def test_layout_equals_one_process(case: Case, precision: str) -> None:
    assert_equals_one_process(case.with_flags(fp64=precision == "fp64"))


def test_the_comparison_sees_a_difference() -> None:
    """Another seed must be told apart, or the tests above could not fail."""
    rows = compare(train(Case.of(seed=1)), train(Case.of(seed=2)), TOLERANCES["fp64"])
    assert all(row.difference > 1e-3 and not row.agrees for row in rows)
