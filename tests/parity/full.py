"""Any number of drawn layouts against one process, with a table at the end.

    python -m tests.parity.full --layouts 120 --seed 1

Ends with 0 where every layout trains the same model as one process.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter

from tests.parity.layouts import draw_case
from tests.parity.runs import Case, rows_against_one_process
from tools.parity.comparison import Row


def main() -> int:
    """Run the layouts one after another; a failure ends none but its own."""
    parser = argparse.ArgumentParser(description="Drawn layouts against one process.")
    parser.add_argument("--layouts", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    print(f"{arguments.layouts} layouts, seed {arguments.seed}", flush=True)
    start = time.monotonic()
    table: list[tuple[Case, list[Row]]] = []
    failed: list[Case] = []
    for number in range(1, arguments.layouts + 1):
        case = draw_case(draw)
        rows = _rows(case)
        table.append((case, rows))
        agrees = bool(rows) and all(row.agrees for row in rows)
        print(f"{number:4} {'ok   ' if agrees else 'WRONG'} {case}", flush=True)
        if not agrees:
            failed.append(case)
            _print_rows(rows)
    print(f"\n{_summary(table)}")
    passed = len(table) - len(failed)
    minutes = (time.monotonic() - start) / 60
    print(f"{passed} of {len(table)} layouts equal one process ({minutes:.1f} minutes)")
    return 1 if failed else 0


def _rows(case: Case) -> list[Row]:
    """The comparison; none where the case could not be run."""
    try:
        return rows_against_one_process(case)
    except (AssertionError, RuntimeError, TimeoutError, ValueError) as error:
        print(f"     {error}")
        return []


def _print_rows(rows: list[Row]) -> None:
    for row in rows:
        print(f"     {row.quantity}: {row.difference:.1e} at {row.where}")


def _summary(table: list[tuple[Case, list[Row]]]) -> str:
    """The largest differences by number format, and how often each option was drawn."""
    lines = []
    for precision in ("fp64", "fp32"):
        rows = [row for case, rows in table if case.precision == precision for row in rows]
        for quantity in dict.fromkeys(row.quantity for row in rows):
            worst = max((r for r in rows if r.quantity == quantity), key=lambda r: r.difference)
            lines.append(
                f"{precision}  {quantity:15} at most {worst.difference:.1e}"
                f"  (tolerance {worst.tolerance:.0e})  {worst.where}"
            )
    drawn: Counter[str] = Counter()
    for case, _ in table:
        drawn[case.network] += 1
        drawn[f"{case.ranks} ranks"] += 1
        drawn[case.precision] += 1
        drawn.update(case.options())
    lines += [f"{count:4} x {what}" for what, count in sorted(drawn.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
