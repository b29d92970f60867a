"""What a person watching the run sees: a line per report and, on a terminal, a progress bar."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

from megatron.monitor.metrics import Record

if TYPE_CHECKING:
    from rich.progress import Progress

_FORMATS: dict[str, Callable[[float], str]] = {
    "grad_norm": lambda x: f"grad norm {x:.3f}",
    "params_norm": lambda x: f"params norm {x:.3f}",
    "learning_rate": lambda x: f"lr {x:.3e}",
    "loss_scale": lambda x: f"loss scale {x:g}",
    "tokens_per_second": lambda x: f"{x:,.0f} tokens/s",
    "model_tflops_per_second": lambda x: (
        f"{x:,.1f} TFLOP/s" if x >= 1 else f"{x * 1000:.1f} GFLOP/s"
    ),
    "iteration_seconds": lambda x: f"{x * 1000:,.1f} ms",
    "skipped": lambda x: f"skipped {x:.0f}",
    "batch_size": lambda x: f"batch {x:,.0f}",
    "consumed_samples": lambda x: f"{x:,.0f} samples",
}


def console_line(record: Record, last_iteration: int) -> str:
    """One line for one record: the iteration, then each quantity with its unit.

    A loss scale of one and a count of no skipped iterations go without saying.
    """
    width = len(str(last_iteration))
    fields = [f"iteration {record['iteration']:>{width}}/{last_iteration}"]
    silent = {"loss_scale": 1, "skipped": 0}
    for key, value in record.items():
        if key == "iteration" or (key in silent and value == silent[key]):
            continue
        number = math.nan if value is None else value
        fields.append(_FORMATS[key](number) if key in _FORMATS else _loss(key, number))
    return " | ".join(fields)


def _loss(key: str, value: float) -> str:
    return f"{key.replace('_', ' ')} {value:.4f}"


class Console(Protocol):
    """Where the run's lines go."""

    def print(self, line: str) -> None:
        """Shows one line."""

    def advance(self, iteration: int) -> None:
        """Says how far the run has come."""

    def close(self) -> None:
        """Ends the display."""


class PlainConsole:
    """Prints lines as they come, to a file, a pipe or a terminal without `rich`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def print(self, line: str) -> None:
        """Writes the line and flushes, so that a log can be followed."""
        print(line, file=self._stream, flush=True)

    def advance(self, iteration: int) -> None:
        """Shows nothing: the lines say how far the run has come."""

    def close(self) -> None:
        """Leaves the stream open for its owner."""


class BarConsole:
    """Prints lines above a progress bar that stays at the bottom of the terminal."""

    def __init__(self, progress: Progress, last_iteration: int, first_iteration: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=last_iteration, completed=first_iteration)
        progress.start()

    def print(self, line: str) -> None:
        """Writes the line above the bar."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def advance(self, iteration: int) -> None:
        """Moves the bar to this iteration."""
        self._progress.update(self._task, completed=iteration)

    def close(self) -> None:
        """Draws the bar a last time and gives the terminal back."""
        self._progress.stop()


def open_console(
    last_iteration: int, first_iteration: int = 0, stream: TextIO | None = None
) -> Console:
    """A console with a progress bar where `stream` (standard output) is a terminal."""
    stream = stream or sys.stdout
    if not stream.isatty():
        return PlainConsole(stream)
    try:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError:
        return PlainConsole(stream)
    columns = (BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=RichConsole(file=stream))
    return BarConsole(progress, last_iteration, first_iteration)
