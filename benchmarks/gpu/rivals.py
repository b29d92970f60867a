"""Contestants of a training contest, each in a process of its own that waits for its turn."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from benchmarks.gpu.context import processes
from benchmarks.gpu.steps import Spec, serve

BURST_SECONDS = 30.0


@dataclass
class Rival:
    """A contestant's process and what it has said; a context that ends it.

    Attributes:
        absent: why it does not take part, or no longer.
        losses: of its first steps.
        step_seconds: of the last of these; None where it was not built.
        peak: bytes of the device that it has taken at most.
        seconds: of a step, by round.
    """

    spec: Spec
    absent: str | None = None
    losses: list[float] = field(default_factory=list)
    step_seconds: float | None = None
    peak: float = 0.0
    seconds: dict[int, float] = field(default_factory=dict)

    def __enter__(self) -> Rival:
        method = processes(self.spec.device_type)
        self._pipe, theirs = method.Pipe()
        self._process = method.Process(  # type: ignore[attr-defined]
            target=serve, args=(theirs, self.spec), daemon=True
        )
        self._process.start()
        theirs.close()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipe.close()
        self._process.kill()  # it holds nothing that has to be saved
        self._process.join()

    def build(self) -> None:
        """Have it begin; `ready` waits for it."""
        self._send(None)

    def ready(self, deadline: float) -> bool:
        """Whether it is built before the deadline, of `time.monotonic`; if not, it is ended."""
        answer = self._answer(deadline - time.monotonic())
        self.losses = answer.get("losses", [])
        self.step_seconds = answer.get("seconds")
        return self.absent is None

    def burst(self, count: int, number: int) -> None:
        """Have it run so many steps in a round of this number."""
        self._send(count)
        answer = self._answer(BURST_SECONDS)
        if self.absent is None:
            self.seconds[number] = answer["seconds"]

    def leave(self) -> None:
        """It gives its memory back to the others; what it has said stays."""
        self._process.kill()
        self._process.join()

    def end(self, reason: str) -> None:
        """It no longer takes part."""
        self.absent = reason
        self.leave()

    def _send(self, message: object) -> None:
        if self.absent is None:
            try:
                self._pipe.send(message)
            except OSError:
                self.end("its process ended")

    def _answer(self, seconds: float) -> dict[str, Any]:
        if self.absent is not None:
            return {}
        try:
            if not self._pipe.poll(max(seconds, 0.0)):
                self.end(f"no answer in {max(seconds, 0.0):.0f} s")
                return {}
            answer: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            self.end("its process ended, perhaps out of memory")
            return {}
        if "absent" in answer:
            self.end(answer["absent"])
        self.peak = max(self.peak, answer.get("peak", 0.0))
        return answer
