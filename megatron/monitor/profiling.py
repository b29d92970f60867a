"""What a step spends its time on: a trace, a table by operator, and ranges that name what runs.

A range says which stage works on which micro-batch, and which layer. Ranges appear in the trace of
`--profile-steps`, and on an NVIDIA GPU as NVTX ranges in Nsight Systems, which can be told to
record the profiled iterations alone (`nsys profile --capture-range=cudaProfilerApi`). Outside a
profile a range costs a function call.

    DIR/rank0.json    a trace for chrome://tracing or ui.perfetto.dev
    DIR/rank0.txt     operators by the time they take
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_NOTHING: AbstractContextManager[None] = nullcontext()
_OPERATORS = 60  # rows of the table

_profiling = False


def annotated(name: str, number: int, more: str = "") -> AbstractContextManager[None]:
    """A range named after what runs in it: "layer 3", or "stage 0 micro-batch 2 forward"."""
    return _range(f"{name} {number}{more}") if _profiling else _NOTHING


@contextmanager
def _range(name: str) -> Iterator[None]:
    on_nvidia = torch.cuda.is_available()
    if on_nvidia:
        torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name):
            yield
    finally:
        if on_nvidia:
            torch.cuda.nvtx.range_pop()


class StepProfiler:
    """Profiles some iterations of a run on this rank, and writes what was found.

    Args:
        steps: their numbers, from 1; none for no profile.
        directory: where to write to.
    """

    def __init__(self, steps: range, directory: Path, rank: int, device: torch.device) -> None:
        self._steps, self._directory, self._rank, self._device = steps, directory, rank, device
        self._profile: profile | None = None

    def begin(self, iteration: int) -> None:
        """Called before an iteration."""
        global _profiling
        if self._profile is not None or iteration not in self._steps:
            return
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.cudart().cudaProfilerStart()
        self._profile = profile(activities=activities, acc_events=True)
        self._profile.start()
        _profiling = True

    def end(self, iteration: int) -> bool:
        """Called after an iteration; whether the profile has just been written."""
        if self._profile is None or iteration + 1 in self._steps:
            return False
        self.close()
        return True

    def close(self) -> None:
        """End a profile that is under way and write what there is of it."""
        global _profiling
        if self._profile is None:
            return
        done, self._profile = self._profile, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.cudart().cudaProfilerStop()
        done.stop()
        _profiling = False
        self._directory.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(self._directory / f"rank{self._rank}.json"))
        time_of = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = done.key_averages().table(sort_by=time_of, row_limit=_OPERATORS)
        path = self._directory / f"rank{self._rank}.txt"
        path.write_text(str(table), encoding="utf-8")
