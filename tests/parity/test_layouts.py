"""Rung 2 of the parity ladder: any layout trains the same model as one process.

Losses, gradient norms and all weights after ten steps, dropout off, within 1e-11 in float64 and
1e-5 in float32, relative.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from tests.parity.runs import Case, Result, largest_difference, train

TOLERANCE = {"fp64": 1e-11, "fp32": 1e-5}

LAYOUTS = [
    Case(tensor=1, micro_batch=1),
    Case(tensor=1, micro_batch=8),
    Case(tensor=2),
    Case(tensor=4, micro_batch=4),
    Case(pipeline=2, layers=(2, 3), micro_batch=1),
    Case(pipeline=2, layers=(4, 1), micro_batch=8),
    Case(pipeline=4, layers=(1, 2, 1, 1), micro_batch=1),
    Case(pipeline=4, layers=(0, 2, 3, 0), schedule="gpipe"),
    Case(data=2, micro_batch=4),
    Case(data=4, micro_batch=1),
    Case(tensor=2, pipeline=2, layers=(3, 2)),
    Case(tensor=2, data=2, micro_batch=1),
    Case(pipeline=2, data=2, layers=(2, 3)),
    Case(tensor=2, pipeline=2, data=2, layers=(1, 4), micro_batch=1),
]


def _name(case: Case) -> str:
    stages = ",".join(map(str, case.layers))
    return (
        f"t{case.tensor}-p{case.pipeline}-d{case.data}-b{case.micro_batch}of{case.global_batch}"
        f"-{stages}-{case.schedule}"
    )


@cache
def _one_process(global_batch: int, precision: str) -> Result:
    return train(Case(global_batch=global_batch, precision=precision))


def _assert_equal_to_one_process(case: Case) -> None:
    expected = _one_process(case.global_batch, case.precision)
    difference, where = largest_difference(train(case), expected)
    assert difference <= TOLERANCE[case.precision], f"{where} differs by {difference:.2e}"


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("case", LAYOUTS, ids=_name)
def test_layout_equals_one_process(case: Case, precision: str) -> None:
    _assert_equal_to_one_process(replace(case, precision=precision))


@pytest.mark.parametrize(
    "case",
    [
        Case(tensor=2, pipeline=2, layers=(2, 3), micro_batch=3, global_batch=12),
        Case(pipeline=2, data=2, layers=(3, 2), micro_batch=6, global_batch=12),
        Case(tensor=2, data=4, micro_batch=3, global_batch=12),
    ],
    ids=_name,
)
def test_another_global_batch(case: Case) -> None:
    _assert_equal_to_one_process(case)


def test_the_comparison_sees_a_difference() -> None:
    """Another seed must be told apart, or the tests above could not fail."""
    difference, _ = largest_difference(train(Case(seed=1)), train(Case(seed=2)))
    assert difference > 1e-2
