"""Named timers that never make the host wait for the device inside a step.

On a CPU a section's time is the wall clock's. On an accelerator the kernels of a section run long
after the host has left it, so the two ends are marked by events in the device's stream, and the
time between them is asked for only when the timers are read, at logging time, when the device has
been waited for anyway.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Moment = float | torch.Event


class Timers:
    """Collects the time spent in named sections on `device`, a CPU or an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sections: dict[str, list[tuple[Moment, Moment]]] = defaultdict(list)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Times the `with` block under `name`; a name may be timed many times before a read."""
        start = self._now()
        yield
        self._sections[name].append((start, self._now()))

    def _now(self) -> Moment:
        if self._device.type in ("cpu", "meta"):
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds spent in each section since the last read; waits for the device."""
        totals = {
            name: sum(_seconds(start, end) for start, end in moments)
            for name, moments in self._sections.items()
        }
        self._sections.clear()
        return totals


def _seconds(start: Moment, end: Moment) -> float:
    if isinstance(start, torch.Event):
        assert isinstance(end, torch.Event)
        end.synchronize()
        return start.elapsed_time(end) / 1000
    assert not isinstance(end, torch.Event)
    return end - start


def across_ranks(
    seconds: dict[str, float], reduce_max: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """The least and the most of each section's seconds over the ranks.

    Every rank calls it with the same section names; `reduce_max` gives the elementwise maximum of
    a float64 vector over the ranks, and is called once.
    """
    values = torch.tensor([seconds[name] for name in sorted(seconds)], dtype=torch.float64)
    least, most = reduce_max(torch.cat([-values, values])).chunk(2)
    return {
        name: (-low, high)
        for name, low, high in zip(sorted(seconds), least.tolist(), most.tolist(), strict=True)
    }
