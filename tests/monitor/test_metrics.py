"""The metrics file holds each report once, whatever killed the run before."""

import json
import math
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.monitor import MetricsFile, read_metrics


def _write(path: Path, iterations: range, last_iteration: int) -> None:
    metrics = MetricsFile(path, last_iteration)
    for iteration in iterations:
        metrics.write({"iteration": iteration, "loss": 1 / iteration})
    metrics.close()


def _iterations(path: Path) -> list[int]:
    return [int(record["iteration"]) for record in read_metrics(path)]


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "runs" / "m.jsonl")
    metrics.write({"iteration": 1, "loss": 2.5, "grad_norm": math.inf})
    line = (tmp_path / "runs" / "m.jsonl").read_text()
    assert json.loads(line) == {"iteration": 1, "loss": 2.5, "grad_norm": None}
    [record] = read_metrics(tmp_path / "runs" / "m.jsonl")
    assert math.isnan(record["grad_norm"])


def test_iterations_done_again_are_not_reported_twice(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, range(1, 8), last_iteration=0)
    with path.open("a") as file:
        file.write('{"iteration": 8, "lo')  # killed while writing
    _write(path, range(6, 11), last_iteration=5)
    assert _iterations(path) == list(range(1, 11))


def test_a_fresh_run_starts_a_fresh_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, range(1, 5), last_iteration=0)
    _write(path, range(1, 3), last_iteration=0)
    assert _iterations(path) == [1, 2]


def test_lines_that_are_left_out_are_kept_beside_the_file(tmp_path: Path) -> None:
    path, old = tmp_path / "m.jsonl", tmp_path / "m.jsonl.old"
    _write(path, range(1, 8), last_iteration=0)
    _write(path, range(8, 10), last_iteration=7)
    assert not old.exists(), "nothing was left out"
    _write(path, range(1, 3), last_iteration=0)
    assert _iterations(path) == [1, 2]
    assert _iterations(old) == list(range(1, 10))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"iteration": 1}\nhello\n', r"m\.jsonl, line 2: is not JSON"),
        ("[1, 2]\n", r"m\.jsonl, line 1: expected a JSON object"),
        ("\xff\n", r"m\.jsonl: cannot be read"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=expected):
        MetricsFile(path, last_iteration=3)
    assert path.read_bytes() == text.encode("latin-1")
