"""How far a long piece of work on data has come: one line on a terminal, a few in a log."""

import sys
import time
from typing import TextIO

SECONDS_ON_TERMINAL = 0.2
SECONDS_IN_LOG = 5.0


class Progress:
    """Reports counts on `stream` (standard error), with their rate, and the share of `total`.

    every: report when the count passes a multiple of this, in place of every few seconds.
    """

    def __init__(
        self,
        action: str,
        unit: str,
        *,
        total: int | None = None,
        every: int | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._action = action
        self._unit = unit
        self._total = total
        self._every = every
        self._stream = stream or sys.stderr
        self._on_terminal = self._stream.isatty()
        self._started = self._reported = time.monotonic()
        self._last_count = 0
        self._unreported: tuple[int, str] | None = None
        self._line = ""

    def advance(self, count: int, note: str = "") -> None:
        """Says that `count` units are done; `note` is shown behind it when a report is due."""
        now = time.monotonic()
        self._unreported = (count, note)
        if self._is_due(count, now):
            self._report(now)

    def close(self) -> None:
        """Says how far the work has come at last, where anything was said, and ends the line."""
        if self._line and self._unreported is not None:
            self._report(time.monotonic())
        if self._on_terminal and self._line:
            print(file=self._stream)

    def _report(self, now: float) -> None:
        assert self._unreported is not None
        count, note = self._unreported
        self._last_count, self._reported, self._unreported = count, now, None
        self._show(self._describe(count, now - self._started, note))

    def _is_due(self, count: int, now: float) -> bool:
        if self._every is not None:
            return count // self._every > self._last_count // self._every
        interval = SECONDS_ON_TERMINAL if self._on_terminal else SECONDS_IN_LOG
        return now - self._reported >= interval

    def _describe(self, count: int, seconds: float, note: str) -> str:
        of_total = f" of {self._total:,}" if self._total is not None else ""
        rate = f"{count / max(seconds, 1e-9):,.0f} {self._unit}/s"
        fields = [
            f"{self._action} {count:,}{of_total} {self._unit}",
            rate,
            note,
            f"{seconds:.0f} s",
        ]
        return ", ".join(field for field in fields if field)

    def _show(self, line: str) -> None:
        if self._on_terminal:
            print(f"\r{line:<{len(self._line)}}", end="", file=self._stream, flush=True)
        else:
            print(line, file=self._stream, flush=True)
        self._line = line
