"""Processes that wait for their turn, built once and asked for one burst after another.

A round asks each contestant for a burst of steps, one after the other, so that what disturbs the
machine disturbs all of them alike and nothing runs beside the one that is measured. The order of
the contestants changes from round to round.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from benchmarks.peers.sizes import Sizes

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 300.0
BURST_SECONDS = 300.0


class ContestantError(RuntimeError):
    """A contestant's process ended or did not answer; says what it wrote."""


@dataclass
class Contestant:
    """A step of a framework on a layout, and what was measured of it.

    Attributes:
        module: its module in `benchmarks.peers`.
        processes, threads: how many, and threads of each.
        absent: why it does not take part.
        losses: of the first two steps.
        seconds: of a step, by the number of the round.
        peak: bytes that the largest of its processes has held.
    """

    module: str
    layout: str
    processes: int = 1
    threads: int = 1
    absent: str | None = None
    losses: list[float] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)
    peak: int = 0

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.module} {self.layout}"


class Team:
    """The running processes of a contestant; ends them on leaving."""

    def __init__(self, contestant: Contestant, sizes: Sizes) -> None:
        self.contestant = contestant
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs: list[TextIO] = []
        port = _free_port()
        for rank in range(contestant.processes):
            self._start(rank, port, json.dumps(asdict(sizes)))

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()  # they hold nothing that has to be saved
        for process in self._processes:
            process.wait()

    def _start(self, rank: int, port: int, sizes: str) -> None:
        contestant = self.contestant
        ours, theirs = Pipe()
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        descriptor = theirs.fileno()
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.worker"]
        command += [contestant.module, contestant.layout, str(contestant.threads)]
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(contestant.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": str(contestant.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        process = subprocess.Popen(
            [*command, str(descriptor), sizes],
            cwd=ROOT,
            env=os.environ | place,
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        theirs.close()
        self._pipes.append(ours)
        self._processes.append(process)
        self._logs.append(log)

    def ready(self) -> None:
        """Wait until it is built, and take down why it is not or its first losses."""
        answers = self._answers(START_SECONDS)
        reasons = [answer["absent"] for answer in answers if "absent" in answer]
        if reasons:
            self.contestant.absent = reasons[0]
        else:
            self.contestant.losses = _known([answer["loss"] for answer in answers])

    def burst(self, steps: int) -> float:
        """Seconds of a step, the slowest process counting."""
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send(steps)
            except OSError as error:
                raise ContestantError(self._report(rank, "ended, perhaps out of memory")) from error
        answers = self._answers(BURST_SECONDS)
        self.contestant.peak = max(answer["peak"] for answer in answers)
        return float(max(answer["seconds"] for answer in answers)) / steps

    def _answers(self, seconds: float) -> list[dict[str, Any]]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(seconds):
                    raise ContestantError(self._report(rank, f"no answer in {seconds:.0f} s"))
                answers.append(pipe.recv())
            except (EOFError, OSError) as error:
                raise ContestantError(self._report(rank, "ended")) from error
        return answers

    def _report(self, rank: int, what: str) -> str:
        self._logs[rank].seek(0)
        written = self._logs[rank].read()[-3000:]
        return f"{self.contestant.name}, process {rank}: {what}\n{written}"


def measure(
    teams: Sequence[Team], rounds: range, steps: int, progress: Callable[[int], None]
) -> None:
    """Let every team run `steps` in each of the rounds, and once before, which does not count."""
    for number in (None, *rounds):
        progress(0 if number is None else number)
        turn = (number or 0) % len(teams)
        for team in (*teams[turn:], *teams[:turn]):
            seconds = team.burst(steps)
            if number is not None:
                team.contestant.seconds[number] = seconds


def _known(losses: Sequence[list[float]]) -> list[float]:
    """The losses of a process that has them: only the last pipeline stage does."""
    return next(each for each in losses if each[0] == each[0])


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
