"""Any number of drawn models and calls against transformers 4.34.0, with a table at the end.

    python -m tests.hf.old.full --cases 200 --layouts 30 --seed 1

Each case is made and answered by transformers 4.34.0, answered by megatron/hf from the files that
transformers saved, saved by megatron/hf, and answered once more by transformers from those files.
``--layouts`` of the cases are answered on two and four ranks as well. At the end the checkpoint
converters of transformers 4.34.0 read files that megatron wrote (`converters`). Ends with 0 where
everything agrees.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.distributed import run_distributed
from tests.hf.old.cases import draw_case, fits
from tests.hf.old.compare import (
    Difference,
    answer_ours,
    check,
    differences,
    disagreements,
    load_ours,
    read_answer,
    worst,
)
from tests.hf.old.converters import converted, written_checkpoints
from tests.hf.old.environment import ask
from tests.hf.old.records import Answer, Case

AT_ONCE = 50
LAYOUTS = [(2, 1), (1, 2), (2, 2)]


@dataclass
class Table:
    """What was compared in each way, the worst of it, and what failed."""

    checks: Counter[str] = field(default_factory=Counter)
    worst: dict[tuple[str, str], tuple[Difference, str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def enter(self, way: str, where: str, compare: Callable[[], list[Difference]]) -> None:
        """Run a comparison; a failure ends none but its own."""
        self.checks[way] += 1
        try:
            found = compare()
            wrong = disagreements(found)
        except Exception:
            found, wrong = [], traceback.format_exc().strip().splitlines()[-3:]
        if wrong:
            self.failures.append(f"{way}: {where}")
            print(f"WRONG {way}: {where}", *wrong, sep="\n      ", flush=True)
        for quantity, difference in worst(found).items():
            key = (way, quantity)
            if key not in self.worst or difference.relative > self.worst[key][0].relative:
                self.worst[key] = (difference, where)

    def lines(self) -> list[str]:
        """How many of each comparison agree, and the largest differences."""
        failed = Counter(line.split(":")[0] for line in self.failures)
        counts = [f"{n - failed[way]:5} of {n} agree: {way}" for way, n in self.checks.items()]
        largest = [
            f"{way}, {quantity}: at most {d.largest_difference:.1e} where values reach"
            f" {d.largest_value:.1e} ({d.name} of {where})"
            for (way, quantity), (d, where) in sorted(self.worst.items())
        ]
        return counts + largest


def main() -> int:
    """Draw, ask and compare in portions of `AT_ONCE` cases."""
    parser = argparse.ArgumentParser(description="Drawn cases against transformers 4.34.0.")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--layouts", type=int, default=20, help="how many run on several ranks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a directory for the files of failed cases")
    arguments = parser.parse_args()
    # What models say of unusual configurations, every other one here.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "position_embedding_type|next_sentence_label")
    draw = random.Random(arguments.seed)
    print(f"{arguments.cases} cases, seed {arguments.seed}", flush=True)
    start = time.monotonic()
    table, drawn = Table(), Counter[str]()
    for first in range(0, arguments.cases, AT_ONCE):
        cases = [draw_case(draw) for _ in range(first, min(first + AT_ONCE, arguments.cases))]
        drawn.update(option for case in cases for option in _options(case))
        with tempfile.TemporaryDirectory() as scratch:
            on_ranks = max(0, arguments.layouts - first)
            _portion(table, cases, first, on_ranks, Path(scratch), arguments.keep)
        print(f"{first + len(cases):5} cases, {len(table.failures)} failures", flush=True)
    _converters(table, arguments.seed)
    print(*[f"{count:5} x {what}" for what, count in sorted(drawn.items())], sep="\n")
    print(*table.lines(), sep="\n")
    minutes = (time.monotonic() - start) / 60
    print(f"{len(table.failures)} of {sum(table.checks.values())} differ ({minutes:.1f} minutes)")
    return 1 if table.failures else 0


def _portion(
    table: Table, cases: list[Case], first: int, on_ranks: int, scratch: Path, keep: Path | None
) -> None:
    """All comparisons of some cases."""
    directories = [scratch / f"{first + number}-{c['class']}" for number, c in enumerate(cases)]
    ask(
        [{"case": c, "directory": str(d)} for c, d in zip(cases, directories, strict=True)],
        scratch,
    )
    failures = len(table.failures)
    for directory in directories:
        table.enter("theirs loaded here", directory.name, partial(_ours, directory))
    saved = [pair for pair in zip(cases, directories, strict=True) if (pair[1] / "ours").exists()]
    ask(
        [
            {"case": case, "model": str(directory / "ours"), "directory": str(directory / "again")}
            for case, directory in saved
        ],
        scratch,
    )
    for _, directory in saved:
        table.enter("ours loaded there", directory.name, partial(_theirs_again, directory))
    for case, directory in list(zip(cases, directories, strict=True))[:on_ranks]:
        for tensor, pipeline in LAYOUTS:
            if fits(case, tensor, pipeline):
                table.enter(
                    f"TP={tensor} PP={pipeline}",
                    directory.name,
                    partial(_on_ranks, directory, tensor, pipeline),
                )
    if keep is not None:
        for line in table.failures[failures:]:
            name = line.split(": ")[1]
            shutil.copytree(scratch / name, keep / name, dirs_exist_ok=True)


def _ours(directory: Path) -> list[Difference]:
    """Ours against theirs on one process; saves our model for the way back."""
    expected = read_answer(directory)
    model = load_ours(expected.case, directory / "model")
    model.save_pretrained(directory / "ours", **expected.case["save"])
    return differences(answer_ours(model, expected), expected)


def _theirs_again(directory: Path) -> list[Difference]:
    """transformers 4.34.0 with the files that we saved, against itself with its own."""
    again, expected = read_answer(directory / "again"), read_answer(directory)
    assert not any(again.loading.values()), f"our files do not fit: {again.loading}"
    for name in expected.config.keys() & set(expected.case["config"]):
        found, value = again.config[name], expected.config[name]
        assert found == value, f"config.{name}: saved as {found!r}, loaded as {value!r}"
    return differences(Answer(again.tensors, again.orders), expected)


def _on_ranks(directory: Path, tensor: int, pipeline: int) -> list[Difference]:
    """The differences of all ranks together."""
    ranks = run_distributed(tensor * pipeline, check, directory, tensor, pipeline)
    return [difference for rank in ranks for difference in rank]


def _converters(table: Table, seed: int) -> None:
    """Models of ours through the converters of transformers 4.34.0."""
    with tempfile.TemporaryDirectory() as scratch:
        for checkpoint in written_checkpoints(seed, Path(scratch)):
            name = checkpoint.directory.name
            table.enter("converters", name, partial(converted, checkpoint))


def _options(case: Case) -> list[str]:
    """What of a case is worth counting."""
    config: dict[str, Any] = case["config"]
    given = {name for call in case["calls"] for name in call}
    return [
        f"class {case['class']}",
        f"hidden_act {config['hidden_act']}",
        f"position_embedding_type {config['position_embedding_type']}",
        *(name for name in ("is_decoder", "add_cross_attention") if config.get(name)),
        *(["a second call"] if len(case["calls"]) > 1 else []),
        *sorted(f"argument {name}" for name in given),
    ]


if __name__ == "__main__":
    sys.exit(main())
