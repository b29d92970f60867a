"""Any number of drawn layouts, planned and run, with the largest deviations at the end.

    python -m tests.planner.full --layouts 100 --seed 1

Ends with 0 where on every rank of every layout weights, gradients, optimizer state and calls are
as planned, and the peak of the activations is within a tenth of it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from tests.parity.runs import Case
from tests.planner.drawn import draw_planned
from tests.planner.observed import Comparison, compare

SHOWN = 5


def main() -> int:
    """Plan and run the layouts one after another; a failure ends none but its own."""
    parser = argparse.ArgumentParser(description="Drawn layouts, planned and run.")
    parser.add_argument("--layouts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    print(f"{arguments.layouts} layouts, seed {arguments.seed}", flush=True)
    start = time.monotonic()
    table: list[tuple[Case, Comparison]] = []
    for number in range(1, arguments.layouts + 1):
        case = draw_planned(draw)
        found = _comparison(case)
        table.append((case, found))
        word = "WRONG" if found.wrong else "ok   "
        print(f"{number:4} {word} {found.deviation:+7.2%} {case}", flush=True)
        for line in found.wrong:
            print(f"     {line}")
    table.sort(key=lambda row: -abs(row[1].deviation))
    print("\nlargest deviations of peak activations")
    for case, found in table[:SHOWN]:
        print(f"{found.deviation:+7.2%} {case}")
    failed = sum(bool(found.wrong) for _, found in table)
    minutes = (time.monotonic() - start) / 60
    print(f"{len(table) - failed} of {len(table)} layouts as planned ({minutes:.1f} minutes)")
    return 1 if failed else 0


def _comparison(case: Case) -> Comparison:
    """Says so where the case could not be planned or run."""
    try:
        return compare(case)
    except (AssertionError, RuntimeError, TimeoutError, ValueError, KeyError) as error:
        return Comparison((f"{type(error).__name__}: {error}",), 0.0)


if __name__ == "__main__":
    sys.exit(main())
