"""Seconds that the device takes for an operation, of several contestants in turn.

A burst of calls is queued behind a delay that is longer than queueing takes, so that the device
goes from one call to the next without waiting for the host, and only its own time counts. In each
round every contestant has a burst, the order turning from round to round: what disturbs the machine
disturbs all alike, and ratios are taken within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Action = Callable[[], Any]

_FIRST_DELAY, _LONGEST_DELAY = 2**21, 2**26  # cycles of the device, about 1 ms and 35 ms


@dataclass(frozen=True)
class Stopwatch:
    """Times bursts on a device."""

    device_type: str

    def seconds(self, actions: Sequence[Action]) -> float:
        """Of one action, where all of them run one after the other."""
        if self.device_type == "cpu":
            start = time.perf_counter()
            for action in actions:
                action()
            return (time.perf_counter() - start) / len(actions)
        delay = _FIRST_DELAY
        while True:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(delay)
            begin.record()
            for action in actions:
                action()
            end.record()
            was_ahead = not begin.query()
            end.synchronize()
            if was_ahead or delay >= _LONGEST_DELAY:
                return begin.elapsed_time(end) / 1e3 / len(actions)
            delay *= 4


@dataclass
class Times:
    """What was measured of one contestant: seconds by round, or why there are none."""

    seconds: list[float] = field(default_factory=list)
    absent: str | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def times_faster_than(self, other: Times) -> float:
        """The median over the rounds of the other's seconds over these."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)


def contest(
    contestants: Mapping[str, Sequence[Action]], stopwatch: Stopwatch, rounds: int
) -> dict[str, Times]:
    """Times of all contestants; the first calls, and those that fail in them, do not count.

    Each has actions that do the same with different memory, so that no input is still in a cache.
    """
    times = {name: Times() for name in contestants}
    for name, actions in contestants.items():
        try:
            for action in actions:
                action()
        except Exception as error:  # whatever a peer or its compiler raises
            times[name].absent = first_line(error)
    present = [name for name in contestants if times[name].absent is None]
    for number in range(rounds):
        turn = number % max(len(present), 1)
        for name in (*present[turn:], *present[:turn]):
            times[name].seconds.append(stopwatch.seconds(contestants[name]))
    return times


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
