"""The metrics file: one JSON object per line, one line per report, never the same report twice.

A run that is killed and started again repeats the iterations after its last checkpoint. Opening
the file therefore first drops the lines of iterations that are about to be done again, and with
them a last line that was cut short; the shortened file is written aside and moved into place. Each
line is handed to the operating system as it is written, so a reader sees it at once and a killed
process loses none.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron.errors import ConfigError

Value = float | int | None
Record = Mapping[str, Value]


class MetricsFile:
    """Writes records to `path`, keeping of an earlier run the lines up to `last_iteration`.

    Where that leaves lines out, the file as it was stays beside it as `path`.old.
    A number that is not finite is written as null, since JSON knows neither NaN nor infinity.
    Raises ConfigError where the file holds something other than metrics.
    """

    def __init__(self, path: Path, last_iteration: int = 0) -> None:
        self._drop_after(path, last_iteration)
        self._file = path.open("a", encoding="utf-8")

    @staticmethod
    def _drop_after(path: Path, last_iteration: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        records = list(read_metrics(path))
        kept = [record for record in records if record["iteration"] <= last_iteration]
        if len(kept) < len(records):
            shutil.copyfile(path, path.with_name(path.name + ".old"))
        aside = path.with_name(path.name + ".tmp")
        aside.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        os.replace(aside, path)

    def write(self, record: Record) -> None:
        """Appends one line; `record` has at least an "iteration"."""
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """Yields the records of a metrics file, leaving out a last line that was cut short.

    Nulls come back as NaN. Raises ConfigError, naming the line, where one is no record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read as a metrics file: {error}"]) from None
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError([f"{path}, line {number}: is not JSON: {error.msg}"]) from None
        if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
            problem = 'expected a JSON object with an "iteration", as a metrics file has'
            raise ConfigError([f"{path}, line {number}: {problem}"])
        yield {key: math.nan if value is None else value for key, value in record.items()}


def _line(record: Record) -> str:
    return json.dumps({key: _finite(value) for key, value in record.items()}) + "\n"


def _finite(value: Value) -> Value:
    return value if value is not None and math.isfinite(value) else None
