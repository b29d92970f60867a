"""The directory of a run's checkpoints, always loadable, whenever the run is killed.

    DIR/latest_checkpointed_iteration.txt    "200"
    DIR/iter_0000100/                        complete, never written to
    DIR/iter_0000200/                        complete, never written to
    DIR/.iter_0000300.tmp/                   being written, or left by a killed run

A checkpoint is written aside, renamed into place when it is complete and on the disk, and named in
the text file last. Where an iteration is saved again, the old directory is first renamed to
`.iter_N.old`, because one directory cannot replace another in a single step. Between the two
renames `iter_N` is absent: then `.iter_N.old`, which is complete, is what is loaded, and what the
next save puts back in place before anything else.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron.errors import CheckpointError

LATEST_FILE = "latest_checkpointed_iteration.txt"
_NAME = "iter_{:07d}"


def latest_iteration(directory: Path) -> int | None:
    """The iteration to continue from; None where there is no checkpoint.

    A run killed before it wrote the text file for the first time leaves one checkpoint, which is
    complete and counts.

    Raises:
        CheckpointError: the text file holds no iteration, or is missing beside several checkpoints.
    """
    path = directory / LATEST_FILE
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        if not (text.isascii() and text.isdigit()):
            raise CheckpointError(f"{path}: found {text[:40]!r}, expected an iteration number")
        return int(text)
    found = sorted(p.name for p in directory.glob("iter_*") if p.name[5:].isdigit())
    if len(found) > 1:
        raise CheckpointError(f"{path} is missing; it says which of {', '.join(found)} to load")
    return int(found[0][5:]) if found else None


def checkpoint_path(directory: Path, iteration: int | None = None) -> Path:
    """The directory of the checkpoint of `iteration`, by default of the latest.

    Raises:
        CheckpointError: there is none.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such directory to load a checkpoint from")
    if iteration is None:
        iteration = latest_iteration(directory)
    if iteration is None:
        raise CheckpointError(f"{directory} holds no checkpoint: {LATEST_FILE} is missing")
    final, replaced = directory / _NAME.format(iteration), _old(directory, iteration)
    path = replaced if replaced.is_dir() and not final.is_dir() else final
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is missing; {directory / LATEST_FILE} names iteration {iteration}"
        )
    return path


def begin(directory: Path, iteration: int) -> Path:
    """Clear away what killed saves left, and make the empty directory to write into."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".iter_*"):
        final = directory / leftover.stem[1:]
        if leftover.suffix == ".old" and not final.exists():
            leftover.rename(final)
        else:
            shutil.rmtree(leftover)
    aside = aside_path(directory, iteration)
    aside.mkdir()
    return aside


def aside_path(directory: Path, iteration: int) -> Path:
    """Where the checkpoint of `iteration` is written until it is complete."""
    return directory / f".{_NAME.format(iteration)}.tmp"


def commit(directory: Path, iteration: int) -> Path:
    """Move the complete checkpoint into place and make it the latest; returns its path."""
    aside, final = aside_path(directory, iteration), directory / _NAME.format(iteration)
    replaced = _old(directory, iteration)
    _sync(path for path in (aside, *aside.rglob("*")))
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    _sync([directory])
    _write_latest(directory, iteration)
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def _old(directory: Path, iteration: int) -> Path:
    return directory / f".{_NAME.format(iteration)}.old"


def _write_latest(directory: Path, iteration: int) -> None:
    aside = directory / f".{LATEST_FILE}.tmp"
    aside.write_text(f"{iteration}\n", encoding="utf-8")
    _sync([aside])
    aside.replace(directory / LATEST_FILE)
    _sync([directory])


def _sync(paths: Iterable[Path]) -> None:
    """Wait until the contents of files and directories are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
