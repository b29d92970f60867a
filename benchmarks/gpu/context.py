"""What a section is given: where it runs, how long it may take, where its findings go."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_IMPORTED = ("agreement", "contests", "training")


def processes(device_type: str) -> BaseContext:
    """How processes are started: afresh, since a process that has used a GPU must not be copied.

    Without one they are copies of one process that has imported everything, which takes seconds.
    """
    if device_type == "cuda":
        return multiprocessing.get_context("spawn")
    copying = multiprocessing.get_context("forkserver")
    copying.set_forkserver_preload([f"benchmarks.gpu.{name}" for name in _IMPORTED])
    return copying


@dataclass
class Context:
    """One section's run.

    Attributes:
        path: the file that holds what was found so far, also if the section is cut off.
        smoke: whether this is a trial on the CPU, at tiny sizes.
        rehearse: whether to compile and to run once what will be measured later, and no more.
        deadline: of `time.monotonic`, after which nothing new is begun.
    """

    path: Path
    smoke: bool
    rehearse: bool
    deadline: float
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def device_type(self) -> str:
        """ "cuda", or "cpu" in a trial."""
        return "cpu" if self.smoke else "cuda"

    @property
    def kernels(self) -> str:
        """What --kernels is where the project's kernels are to run."""
        return "emulated" if self.smoke else "cuda"

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    def record(self, key: str, value: Any) -> None:
        """Write down a finding, at once."""
        self.found[key] = value
        aside = self.path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(self.found))
        aside.replace(self.path)
