"""Whether there is room for what a run writes, and whether it may be written.

A checkpoint is written beside the last one, and none is ever deleted (`checkpoint.directory`). So a
run of N checkpoints needs space for N; one that has space for two can start, and trains on until
the disk is full or somebody has made room.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron.config import TrainConfig
from megatron.monitor import read_metrics
from megatron.training.batch_ramp import BatchRamp
from megatron.validation.checks import mistakes_of
from megatron.validation.files import checkpoint_directories_are_usable
from megatron.validation.places import WARNING, existing_part, why_not_writable


@dataclass(frozen=True)
class Start:
    """From where a run goes on."""

    iteration: int = 0
    samples: int = 0


def room_problems(
    train: TrainConfig, data_parallel_size: int, start: Start, checkpoint_bytes: int | None
) -> list[str]:
    """A line for each place that cannot be written to, and for a disk that is too small.

    checkpoint_bytes: the size of one checkpoint; None where it is not known.
    """
    problems = mistakes_of(lambda: checkpoint_directories_are_usable(train.save, None))
    if train.save is not None and not problems:
        saves = _saves(train, data_parallel_size, start)
        problems += mistakes_of(partial(_checkpoints, Path(train.save), saves, checkpoint_bytes))
    return problems + mistakes_of(partial(_records, train))


def _saves(train: TrainConfig, data_parallel_size: int, start: Start) -> list[int]:
    """The iterations after which a run saves, the last one included."""
    last = train.train_iters or 0
    if train.train_samples is not None:
        ramp = BatchRamp.of(train, data_parallel_size)
        last = start.iteration + ramp.steps(start.samples, train.train_samples)
    every = train.save_interval or max(last, 1)
    first = (start.iteration // every + 1) * every
    saves = list(range(first, last + 1, every))
    return saves + [last] * (last > start.iteration and last % every != 0)


def _checkpoints(save: Path, saves: list[int], checkpoint_bytes: int | None) -> Iterator[str]:
    reason = why_not_writable(save)
    if reason is not None:
        yield f"--save {save}: {reason}"
    if not checkpoint_bytes or not saves:
        return
    free = shutil.disk_usage(existing_part(save.absolute())).free
    fit, least = free // checkpoint_bytes, min(2, len(saves))
    each, needed = _amount(checkpoint_bytes), _amount(least * checkpoint_bytes)
    if fit < least:
        beside = ", and is written beside the last one" if least > 1 else ""
        yield (
            f"--save {save}: {_amount(free)} are free, expected {needed} at least: "
            f"a checkpoint takes {each}{beside}"
        )
    elif fit < len(saves):
        yield (
            f"{WARNING}--save {save}: the {len(saves)} checkpoints of this run take "
            f"{_amount(len(saves) * checkpoint_bytes)}, {each} each, and {_amount(free)} are free: "
            f"that of iteration {saves[fit]} will not fit unless older ones are moved away"
        )


def _records(train: TrainConfig) -> list[str]:
    """What is wrong with the places of metrics, curves and profiles."""
    directories = {"--tensorboard-dir": train.tensorboard_dir}
    if train.profile_steps is not None:
        directories["--profile-dir"] = train.profile_dir
    problems = [
        f"{option} {directory}: {reason}"
        for option, directory in directories.items()
        if directory is not None and (reason := why_not_writable(Path(directory))) is not None
    ]
    if train.metrics_file is not None:
        problems += mistakes_of(partial(_metrics, Path(train.metrics_file)))
    return problems


def _metrics(path: Path) -> Iterator[str]:
    reason = why_not_writable(path.parent)
    if reason is not None:
        yield f"--metrics-file {path}: {reason}"
    if path.exists():
        deque(read_metrics(path), maxlen=0)  # an earlier run's, which is gone on with


def _amount(size: int) -> str:
    """A number of bytes as people say it."""
    amount, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:,.4g} {units[0]}"
