"""Writes the fixture of `tests/hf`: small models and answers of transformers 4.34.0.

    python -m tests.hf.old.make_fixture

Two cases of every class go into tests/hf/fixtures/transformers-4.34.0.zip: configuration and
weights as transformers saved them, inputs, outputs and gradients.
"""

from __future__ import annotations

import json
import random
import tempfile
import zipfile
from itertools import cycle
from pathlib import Path
from typing import Any

from tests.hf.old.cases import ACTIVATIONS, CLASSES, draw_case
from tests.hf.old.environment import ask
from tests.hf.old.fixture import ARCHIVE

SEED, CASES_OF_A_CLASS = 6361, 2


def main() -> None:
    """Draw the cases, ask transformers 4.34.0, and pack what it wrote."""
    draw = random.Random(SEED)
    with tempfile.TemporaryDirectory() as scratch:
        names = [(n, name) for n in range(CASES_OF_A_CLASS) for name in CLASSES]
        jobs: list[dict[str, Any]] = [
            {"case": draw_case(draw, name, small=True), "directory": f"{scratch}/{number}-{name}"}
            for number, name in names
        ]
        for job, activation in zip(jobs, cycle(ACTIVATIONS), strict=False):
            job["case"]["config"]["hidden_act"] = activation
        ask(jobs, Path(scratch))
        _pack(Path(scratch), [Path(job["directory"]) for job in jobs])
    print(f"{len(jobs)} cases, {ARCHIVE.stat().st_size / 1e6:.2f} MB in {ARCHIVE}")


def _pack(scratch: Path, directories: list[Path]) -> None:
    """One archive whose bytes depend on its files alone, not on when they were written."""
    ARCHIVE.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for directory in sorted(directories):
            record = json.loads((directory / "answer.json").read_text())
            if "error" in record:
                raise RuntimeError(record["error"])
            for file in sorted(path for path in directory.rglob("*") if path.is_file()):
                info = zipfile.ZipInfo(str(file.relative_to(scratch)))
                archive.writestr(info, file.read_bytes(), zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    main()
