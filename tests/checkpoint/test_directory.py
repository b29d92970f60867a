"""The directory of checkpoints is loadable at every moment, and says what is wrong with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron.checkpoint.directory import (
    LATEST_FILE,
    begin,
    checkpoint_path,
    commit,
    latest_iteration,
)
from megatron.errors import CheckpointError
from tests.checkpoint import killed_saves


def test_killed_at_any_change_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.killed_saves", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("kills") == len(killed_saves.SITUATIONS), run.stdout


def put(directory: Path, iteration: int, content: str) -> None:
    (begin(directory, iteration) / "content").write_text(content)
    commit(directory, iteration)


def test_the_latest_is_the_last_that_was_saved(tmp_path: Path) -> None:
    assert latest_iteration(tmp_path / "absent") is None
    for iteration in (100, 200, 100):
        put(tmp_path, iteration, f"{iteration}")
        assert latest_iteration(tmp_path) == iteration
        assert checkpoint_path(tmp_path) == tmp_path / f"iter_{iteration:07d}"
    assert (tmp_path / LATEST_FILE).read_text().strip() == "100"


def test_a_single_checkpoint_counts_without_the_text_file(tmp_path: Path) -> None:
    put(tmp_path, 7, "seven")
    (tmp_path / LATEST_FILE).unlink()
    assert checkpoint_path(tmp_path) == tmp_path / "iter_0000007"
    (tmp_path / "iter_0000008").mkdir()
    with pytest.raises(CheckpointError, match="is missing; .* iter_0000007, iter_0000008"):
        latest_iteration(tmp_path)


@pytest.mark.parametrize("text", ["", "ten", "-1", "1.5", "\x00\xff", "²"])
def test_garbled_text_files_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / LATEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{LATEST_FILE}: found .*, expected an iteration"):
        checkpoint_path(tmp_path)


def test_a_named_but_missing_checkpoint_is_reported(tmp_path: Path) -> None:
    (tmp_path / LATEST_FILE).write_text("12\n")
    with pytest.raises(CheckpointError, match="iter_0000012 is missing"):
        checkpoint_path(tmp_path)
