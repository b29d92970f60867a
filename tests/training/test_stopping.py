"""Runs end early after the same step on every rank, in good order."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pretrain_bert
from megatron.checkpoint.reader import Checkpoint
from megatron.mpu import ParallelState, Topology
from megatron.training.signals import Signals
from megatron.training.stopping import (
    INTERRUPTED_FILE,
    BrokenOffError,
    Stopping,
    seconds_since_start,
)
from tests.distributed import distributed
from tests.training.command import Command
from tests.training.corpus import Corpus
from tests.training.device_rules import no_waiting
from tests.training.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 120


@contextmanager
def _stopping(state: ParallelState, **train: object) -> Iterator[Stopping]:
    config = tiny_config(train={"log_interval": 2, **train}).train
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    signals = Signals(with_sigterm=config.exit_signal_handler)
    try:
        with signals, Stopping(config, state, signals) as stopping:
            yield stopping
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _text(stopping: Stopping, iteration: int) -> str | None:
    reason = stopping(iteration)
    return None if reason is None else reason.text


@pytest.mark.parametrize("every_step", [False, True])
def test_goes_on_where_nothing_is_asked_for(every_step: bool) -> None:
    with _stopping(ParallelState.single(), exit_signal_handler=every_step) as stopping:
        assert [stopping(iteration) for iteration in range(1, 9)] == [None] * 8
        assert list(stopping.breaking_off(iter("abcdef"), 2)) == list("abcdef")


@pytest.mark.parametrize("every_step", [False, True])
def test_exit_interval_ends_at_its_multiples(every_step: bool) -> None:
    interval = {"exit_interval": 3, "exit_signal_handler": every_step}
    with _stopping(ParallelState.single(), **interval) as stopping:
        assert stopping(2) is None
        assert _text(stopping, 3) == "--exit-interval 3 is reached"


def test_duration_ends_at_the_next_report() -> None:
    with _stopping(ParallelState.single(), exit_duration_in_mins=1e-9) as stopping:
        assert stopping(1) is None
        assert _text(stopping, 2) == "--exit-duration-in-mins is over"


def test_duration_counts_from_the_start_of_the_program() -> None:
    # The processor's time of a thread is less than what has gone by since its process was started.
    assert time.thread_time() < seconds_since_start()
    minutes = seconds_since_start() / 60
    late = {"exit_duration_in_mins": minutes, "exit_signal_handler": True}
    with _stopping(ParallelState.single(), **late) as stopping:
        assert stopping(1) is None
        assert _text(stopping, 2) == "--exit-duration-in-mins is over"


@distributed(4)
def test_a_signal_to_one_rank_ends_all_of_them() -> None:
    state = ParallelState.create(Topology(4, tensor=2, pipeline=2))
    with _stopping(state) as stopping:
        if dist.get_rank() == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stopping(1) is None
        assert _text(stopping, 2) == "SIGUSR1 asked for it"
    faulthandler.register(signal.SIGUSR1)  # as the pool of test processes had it


@distributed(4)
def test_a_signal_at_any_moment_ends_all_ranks_after_the_same_step_of_the_next_two() -> None:
    state = ParallelState.create(Topology(4, tensor=2, pipeline=2))
    for number, late in ((signal.SIGTERM, False), (signal.SIGUSR1, True)):
        with _stopping(state, exit_signal_handler=True, log_interval=1000) as stopping:
            assert stopping(1) is None
            if dist.get_rank() == 2 and not late:
                os.kill(os.getpid(), number)
            assert stopping(2) is None
            if dist.get_rank() in (0, 3) and late:
                os.kill(os.getpid(), number)
            reasons = [_text(stopping, iteration) for iteration in (3, 4, 5)]
            # The word of a signal in step 2 has gone round in step 3; of one in step 3, in step 4.
            asked = f"{number.name} asked for it"
            assert reasons == [None if late else asked, asked, asked]
    faulthandler.register(signal.SIGUSR1)


@distributed(2)
def test_an_evaluation_is_broken_off_after_the_same_step_on_all_ranks() -> None:
    state = ParallelState.create(Topology(2))
    with _stopping(state, exit_signal_handler=True) as stopping:
        assert stopping(1) is None
        batches = stopping.breaking_off(iter(range(100)), 2)
        taken = [next(batches) for _ in range(4)]
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(BrokenOffError):
            taken.extend(batches)
        assert taken == [0, 1, 2, 3, 4, 5]
        assert _text(stopping, 1) == "SIGTERM asked for it"
    faulthandler.register(signal.SIGUSR1)


def test_the_host_waits_for_no_device() -> None:
    with _stopping(ParallelState.single(), exit_signal_handler=True) as stopping, no_waiting():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping(1) is None
        assert stopping(2) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_brings_the_word_to_the_host() -> None:
    with _stopping(ParallelState.single("cuda"), exit_signal_handler=True) as stopping:
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert [stopping(1), stopping(2)] == [None, None]
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopping(3) is None
            assert stopping(4) is not None
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("error", "obeyed", "raised"),
    [(RuntimeError(), False, True), (RuntimeError(), True, False), (ValueError(), False, False)],
    ids=["lost", "of its own, at the end", "of its own"],
)
def test_a_rank_that_is_ended_since_another_was_lost_says_nothing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, obeyed: bool, raised: bool
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")

    def run() -> None:
        with Signals(with_sigterm=True) as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            signals.obeyed = obeyed
            raise error

    with pytest.raises(type(error)):
        run()
    # torchrun is free to end it from now on, as it does without the flag.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert ended == [signal.SIGTERM] * raised


def test_a_run_that_cannot_save_ends_before_it_reads_its_data(
    corpus: Corpus,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = Command(pretrain_bert, capfd, monkeypatch)
    directory = corpus.vocab_file / "run"
    damaged = tmp_path / "damaged"
    for suffix in (".idx", ".bin"):
        damaged.with_suffix(suffix).touch()
    tokenizer = "BertWordPieceLowerCase"
    code = command(corpus.flags(save=directory, data_path=damaged, tokenizer_type=tokenizer))
    assert (code, command.out) == (2, "")
    assert command.err == f"error: --save {directory}: {corpus.vocab_file} is no directory\n"


AT_A_SAMPLE = """
import os, signal, sys
from megatron.arguments import parse_config
from megatron.errors import run_command
from megatron.training import BertPretraining, checkpoints, loop, pretrain

# Signals this process, and all that it has started, at one sample, and before and after it saves.
class Signalled(BertPretraining):
    counted = 0

    def denominators(self, batch):
        self.counted += 1
        if self.counted == int(sys.argv[1]):
            os.killpg(0, signal.SIGTERM)
        return super().denominators(batch)

def save(*args):
    os.killpg(0, signal.SIGTERM)
    plain(*args)
    os.killpg(0, signal.SIGUSR1)

plain, checkpoints.save = checkpoints.save, save
run_command(lambda: pretrain(parse_config(sys.argv[2:], prog="signalled.py"), Signalled))
"""


def _run(script: Path, sample: int, flags: list[str], word: Path) -> str:
    """Runs the script in a process group of its own to its end in good order: what it said."""
    run = subprocess.run(
        [sys.executable, str(script), str(sample), *flags],
        env=os.environ | {INTERRUPTED_FILE: str(word), "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_a_run_with_workers_profiler_and_writers_ends_with_code_zero_and_goes_on(
    corpus: Corpus,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script, run, word = tmp_path / "signalled.py", tmp_path / "run", tmp_path / "interrupted"
    script.write_text(AT_A_SAMPLE)
    flags = corpus.flags(
        save=run,
        load=run,
        num_workers=2,
        eval_iters=4,
        eval_interval=100,
        tokenizer_type="BertWordPieceLowerCase",
        tensorboard_dir=tmp_path / "tensorboard",
        profile_steps="3:9",
        profile_dir=tmp_path / "profile",
        log_interval=100,
    )
    # Two micro-batches a step: the seventh belongs to step 4, and step 5 ends knowing of it.
    out = _run(script, 7, [*flags, "--exit-signal-handler"], word)
    ending = "ending after iteration 5: SIGTERM asked for it"
    assert f"{ending}; the same command goes on from there\n" in out
    assert word.read_text() == ending + "\n"
    assert Checkpoint.open(run).run_state["iteration"] == 5
    assert (tmp_path / "profile" / "rank0.json").exists()
    # To the end, where saving is followed by a signal and by the evaluation on the test set.
    out = _run(script, 0, [*flags, "--exit-signal-handler"], word)
    assert "the test evaluation of iteration 12 is broken off" in out
    assert "ending after iteration 12: SIGUSR1 asked for it" in word.read_text()
    word.unlink()
    monkeypatch.setenv(INTERRUPTED_FILE, str(word))
    command = Command(pretrain_bert, capfd, monkeypatch)
    assert command(flags) == 0, command.err
    assert "test loss" in command.out and "ending" not in command.out and not word.exists()
