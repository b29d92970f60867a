"""The signals that ask a run to end, noted from its first moment to the end of the process.

A batch system sends SIGUSR1 or SIGTERM before it takes the machines away. A handler notes which,
and the run ends when its ranks have agreed on it (`stopping`). SIGTERM is noted with
--exit-signal-handler only: otherwise it ends a rank at once, which is how torchrun ends the ranks
that have lost one of them.

A signal to all processes of a job also reaches those that prepare batches. They never see it, since
a rank that lost one of them could not go on.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import TypeVar

T = TypeVar("T")


class Signals(AbstractContextManager["Signals"]):
    """What has come of SIGUSR1 and, if `with_sigterm`, SIGTERM since the `with` block was entered.

    After a run that went well the signals are still noted, and do nothing: one that comes late, or
    again, may not spoil exit code 0.

    Attributes:
        came: the signal that has come last; None where none has.
        obeyed: whether the run has agreed to end, for whatever reason.
    """

    def __init__(self, *, with_sigterm: bool) -> None:
        self.came: signal.Signals | None = None
        self.obeyed = False
        self._noted = {signal.SIGUSR1, signal.SIGTERM} if with_sigterm else {signal.SIGUSR1}

    def __enter__(self) -> Signals:
        for number in self._noted:
            signal.signal(number, self._note)
        # The interpreter takes its handlers away before the process is over.
        atexit.register(self._ignore)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or signal.SIGTERM not in self._noted:
            return
        # From here on torchrun may end this rank with the others, as it does without the flag.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        was_ended = self.came == signal.SIGTERM and not self.obeyed
        if was_ended and isinstance(error, RuntimeError) and "TORCHELASTIC_RUN_ID" in os.environ:
            # torchrun has lost another rank, and this error says no more than that.
            signal.raise_signal(signal.SIGTERM)

    def kept_from_workers(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches; processes that are started for the first of them leave the signals alone."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._noted)
        try:
            first = next(batches, None)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if first is not None:
            yield first
            yield from batches

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = signal.Signals(number)

    def _ignore(self) -> None:
        for number in self._noted:
            signal.signal(number, signal.SIG_IGN)
