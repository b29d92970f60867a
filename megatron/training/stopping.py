"""When a run ends before its last iteration: by the flags, by the clock, by a signal.

All ranks must end after the same step. They agree on it where they report together, at the end of
each `--log-interval`. The signal is SIGUSR1, which a batch system can send before its time is up;
SIGTERM is left alone, since it is how torchrun ends the ranks that have lost one of them.
"""

from __future__ import annotations

import signal
import time

import torch

from megatron.config import TrainConfig
from megatron.mpu import ParallelState
from megatron.mpu.collectives import MAX, all_reduce


class Stopping:
    """Says after each step whether the run ends there; every rank asks it."""

    def __init__(self, train: TrainConfig, state: ParallelState) -> None:
        self._train = train
        self._state = state
        self._signalled = False
        minutes = train.exit_duration_in_mins
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        signal.signal(signal.SIGUSR1, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        self._signalled = True

    def __call__(self, iteration: int) -> str | None:
        """The reason to end after this iteration, None to go on."""
        interval = self._train.exit_interval
        if interval is not None and iteration % interval == 0:
            return f"--exit-interval {interval} is reached"
        if iteration % self._train.log_interval:
            return None
        late = self._deadline is not None and time.monotonic() > self._deadline
        wishes = torch.tensor(2 * late + self._signalled, device=self._state.device)
        all_reduce(all_reduce(wishes, self._state.model, MAX), self._state.data, MAX)
        reasons = {1: "SIGUSR1 asked for it", 2: "--exit-duration-in-mins is over"}
        return reasons.get(min(int(wishes.item()), 2))
