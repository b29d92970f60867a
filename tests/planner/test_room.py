"""Room for checkpoints: as many are counted as a run writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pretrain_gpt
from megatron.config import TrainConfig
from megatron.planner.room import Start, room_problems
from megatron.training.batch_ramp import BatchRamp
from tests.data.support import EXAMPLES
from tests.training.command import Command
from tests.training.corpus import write_corpus

SIZE = 1 << 30


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk with as much free space as its `free` says."""
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    return usage


def _train(save: Path, **fields: Any) -> TrainConfig:
    return TrainConfig(micro_batch_size=1, save=str(save), **fields)


def _saved_by_hand(train: TrainConfig, ramp: BatchRamp, start: Start) -> list[int]:
    """What the loop does, step by step."""
    iteration, samples, saved = start.iteration, start.samples, [start.iteration]
    while (
        iteration < (train.train_iters or 0)
        if train.train_samples is None
        else samples + ramp.at(samples) <= train.train_samples
    ):
        samples += ramp.at(samples)
        iteration += 1
        if train.save_interval is not None and iteration % train.save_interval == 0:
            saved.append(iteration)
    return saved[1:] + [iteration] * (iteration != saved[-1])


@given(
    length=st.integers(0, 60),
    interval=st.none() | st.integers(1, 20),
    begun=st.integers(0, 60),
    by_samples=st.booleans(),
    ramps=st.booleans(),
)
@EXAMPLES
def test_a_disk_fits_that_fits_all_checkpoints_of_the_run(
    tmp_path: Path,
    length: int,
    interval: int | None,
    begun: int,
    by_samples: bool,
    ramps: bool,
) -> None:
    run = {"train_samples": length * 4} if by_samples else {"train_iters": length}
    ramp = {"rampup_batch_size": (2, 1, 40)} if by_samples and ramps else {}
    train = _train(tmp_path, save_interval=interval, global_batch_size=4, **run, **ramp)
    start = Start(begun, begun * 4 if by_samples else begun)
    saves = _saved_by_hand(train, BatchRamp.of(train, 1), start)

    def said(free: int) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
            return room_problems(train, 1, start, SIZE)

    assert said(len(saves) * SIZE) == []
    if len(saves) > 2:
        for fit in {2, len(saves) - 1}:
            (line,) = said(fit * SIZE)
            assert line.startswith("warning: --save")
            assert f" {len(saves)} checkpoints" in line
            assert f"that of iteration {saves[fit]} will not fit" in line
    if saves:
        (line,) = said(min(2, len(saves)) * SIZE - 1)
        assert line.startswith("--save") and "a checkpoint takes 1 GiB" in line


def test_the_checkpoints_are_those_that_a_run_leaves(
    tmp_path: Path,
    disk: SimpleNamespace,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = {"train_iters": 12, "save_interval": 5}
    train = _train(tmp_path / "run", **fields)
    disk.free = 2 * SIZE
    (line,) = room_problems(train, 1, Start(), SIZE)
    assert "the 3 checkpoints of this run take 3 GiB" in line and "iteration 12 will" in line
    monkeypatch.undo()
    command = Command(pretrain_gpt, capfd, monkeypatch)
    flags = {"tokenizer_type": "BertWordPieceLowerCase", "save": tmp_path / "run", **fields}
    assert command(write_corpus(tmp_path).flags(**flags)) == 0, command.err
    left = sorted(path.name for path in (tmp_path / "run").glob("iter_*"))
    assert left == ["iter_0000005", "iter_0000010", "iter_0000012"]


def test_without_a_size_the_disk_is_left_out(tmp_path: Path, disk: SimpleNamespace) -> None:
    assert room_problems(_train(tmp_path / "run", train_iters=9), 1, Start(), None) == []
