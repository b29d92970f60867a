"""The picture of the loss curves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _plot(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "plot_metrics.py", *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def _metrics(path: Path, *records: dict[str, float]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_two_runs_and_a_baseline_become_one_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [
        _metrics(
            tmp_path / f"{name}.jsonl",
            *({"iteration": i, "loss": 9 - i, "lm_loss": 8 - i, "nsp_loss": 1} for i in range(5)),
            {"iteration": 5, "validation_loss": 4.0, "validation_lm_loss": 3.0},
        )
        for name in ("one", "two")
    ]
    picture = tmp_path / "pictures" / "loss.svg"
    finished = _plot(*files, "--output", picture, "--baseline", "lm_loss=6.1")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"wrote {picture}\n"
    assert picture.read_text().count("<svg") == 1


def test_a_file_without_a_loss_is_one_line(tmp_path: Path) -> None:
    finished = _plot(
        _metrics(tmp_path / "a.jsonl", {"iteration": 1}), "--output", tmp_path / "p.png"
    )
    assert (finished.returncode, finished.stderr) == (2, "error: no loss is reported in a\n")
