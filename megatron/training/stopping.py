"""When a run ends before its last iteration: by the flags, by the clock, by a signal.

All ranks must end after the same step, though a signal reaches them at different moments, or only
some of them. So they tell each other what they know, by an all-reduce over all of them.

With --exit-signal-handler it starts after each step and is looked at one step later: nobody waits
for it, since the device has a step to compute while the host looks. A signal in one step is known
everywhere after the next one. So the run ends with the step after the one that a signal falls into,
by the count of the host, which on an accelerator is a step ahead: within three steps, and the time
that a checkpoint takes. A step of an evaluation counts as one: the evaluation is broken off. The
run that goes on from the checkpoint repeats it only if it was the last one, on the test set.

Without the flag the ranks ask each other where they report together, at the end of each
--log-interval, and wait for the answer there. An evaluation is then finished first.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron.config import TrainConfig
from megatron.mpu import ParallelState
from megatron.mpu.collectives import MAX, start_all_reduce
from megatron.mpu.direct import Pending, wait_for
from megatron.mpu.parallel_state import Axis
from megatron.mpu.staging import uses_gloo
from megatron.mpu.watchdog import waiting
from megatron.training.signals import Signals

T = TypeVar("T")

INTERRUPTED_FILE = "MEGATRON_INTERRUPTED_FILE"
_IMPORTED = time.monotonic()
_TIME_IS_OVER = int(signal.NSIG)  # above the number of any signal


@dataclass(frozen=True)
class Reason:
    """Why a run ends before its last iteration.

    Attributes:
        text: it in words.
        from_outside: whether it was interrupted by a signal or the clock, and is to be started
            again; otherwise it ended where its flags say.
    """

    text: str
    from_outside: bool


class BrokenOffError(Exception):
    """An evaluation is not finished, since the run ends."""


class Stopping(AbstractContextManager["Stopping"]):
    """Says after each step whether the run ends there; every rank asks it, inside the `with` block.

    Attributes:
        reason: why the run ends, the same on every rank; None while it goes on.
    """

    def __init__(self, train: TrainConfig, state: ParallelState, signals: Signals) -> None:
        self.reason: Reason | None = None
        self._train = train
        self._signals = signals
        minutes = train.exit_duration_in_mins
        left = math.inf if minutes is None else 60 * minutes - seconds_since_start()
        self._deadline = time.monotonic() + left
        self._largest = _Largest(state)
        self._under_way = False

    def __call__(self, iteration: int) -> Reason | None:
        """The reason to end after this iteration, None to go on."""
        interval = self._train.exit_interval
        if self._train.exit_signal_handler:
            self._look_back()
        elif iteration % self._train.log_interval == 0:
            self._largest.start(self._wish())
            self._hear(self._largest.look())
        if self.reason is None and interval is not None and iteration % interval == 0:
            self._agree(Reason(f"--exit-interval {interval} is reached", from_outside=False))
        return self.reason

    def breaking_off(self, batches: Iterator[T], in_a_step: int) -> Iterator[T]:
        """The batches of an evaluation, `in_a_step` of them at a time; raises BrokenOffError."""
        for count, batch in enumerate(batches):
            if count and count % in_a_step == 0 and self._train.exit_signal_handler:
                self._look_back()
            if self.reason is not None:
                raise BrokenOffError
            yield batch

    def say_goodbye(self, iteration: int) -> str:
        """What the run says when it ends for a reason; called on rank 0, after it has saved.

        A run that was interrupted, and goes on when it is started again, also says so in the file
        that the environment variable MEGATRON_INTERRUPTED_FILE names, for whoever starts it.
        """
        assert self.reason is not None
        line = f"ending after iteration {iteration}: {self.reason.text}"
        train, file = self._train, os.environ.get(INTERRUPTED_FILE)
        if train.save is None:
            return f"{line}; nothing is saved, since --save is not given"
        same = train.load is not None and Path(train.load).resolve() == Path(train.save).resolve()
        if train.finetune or not same:
            return f"{line}; --load {train.save} goes on from there"
        if file is not None and self.reason.from_outside:
            Path(file).write_text(line + "\n")
        return f"{line}; the same command goes on from there"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The process groups may not be left while something is under way.
        if error is None and self._under_way:
            self._largest.look()

    def _look_back(self) -> None:
        """Hears what the ranks knew a step ago, and begins to ask what they know now."""
        if self.reason is None:
            if self._under_way:
                self._hear(self._largest.look())
            self._under_way = self.reason is None
        if self.reason is None:
            self._largest.start(self._wish())

    def _wish(self) -> int:
        """What this rank knows: the number of a signal, a larger one for the clock, or nothing."""
        if time.monotonic() > self._deadline:
            return _TIME_IS_OVER
        return int(self._signals.came or 0)

    def _hear(self, wish: int) -> None:
        if wish == _TIME_IS_OVER:
            self._agree(Reason("--exit-duration-in-mins is over", from_outside=True))
        elif wish:
            self._agree(Reason(f"{signal.Signals(wish).name} asked for it", from_outside=True))

    def _agree(self, reason: Reason) -> None:
        self.reason = reason
        self._signals.obeyed = True


class _Largest:
    """The largest of the numbers that the ranks have; the host waits for no device in `start`."""

    def __init__(self, state: ParallelState) -> None:
        alone = state.world_size == 1
        ranks = tuple(range(state.world_size))
        self._world = Axis(ranks, state.rank, None if alone else dist.group.WORLD)
        on_host = state.device.type == "cpu" or uses_gloo(self._world.group)
        self._number = torch.zeros((), dtype=torch.int64, device="cpu" if on_host else state.device)
        self._pending = Pending(self._number)
        # A device's main stream waits for nothing here: another one brings the number to the host.
        self._stream = None if on_host else torch.Stream(state.device)
        self._arrived: torch.Event | None = None
        self._answer = (
            self._number
            if on_host
            else torch.zeros_like(self._number, device="cpu", pin_memory=True)
        )
        self._seen = self._answer.numpy()

    def start(self, number: int) -> None:
        """Begins to ask for the largest; every rank does, when it has looked at the last."""
        self._number.fill_(number)
        self._pending = start_all_reduce(self._number, self._world, MAX)
        if self._stream is not None:
            self._stream.wait_stream(torch.accelerator.current_stream(self._number.device))
            with self._stream:
                self._answer.copy_(self._pending.wait(), non_blocking=True)
                self._arrived = self._stream.record_event()

    def look(self) -> int:
        """The largest, when it is there."""
        if self._arrived is None:
            self._pending.wait()
        else:
            with waiting(wait_for("word whether the run ends", self._world)):
                self._arrived.synchronize()
        return int(self._seen)


def seconds_since_start() -> float:
    """How old this process is, as the system counts it: the start of PyTorch included.

    Elsewhere than on Linux, since this file was imported.
    """
    if sys.platform != "linux":
        return time.monotonic() - _IMPORTED
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # the 22nd field, see proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
