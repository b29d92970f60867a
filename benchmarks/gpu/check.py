"""Builds, tests and measures the project on the GPU that is here, in less than nine minutes.

    make gpu-check
    python3 -m benchmarks.gpu.check [--only kernels,training] [--minutes M] [--out DIR] [--smoke]

Runs from the plain source tree with a Python that has PyTorch. Each section is a process of its
own with a limit of its own: one that crashes or hangs leaves the others. What is found is written,
after every section, to gpu-NAME.json and as a table to gpu-NAME.md, NAME being the GPU's; what the
sections print is kept in build/gpu-check/.

    machine     the GPU, its copy's and its matrix product's speed
    build       compiles the kernels             these, and a rehearsal that fills the compilers'
    tests       tests/ops and tests/gpu          caches for the two that follow, run side by side
    sanitizer   races and memory
    agreement   TP=2 and PP=2 on the one GPU
    kernels     every kernel, measured
    training    BERT and GPT, measured

The exit code is 1 where a section failed or was cut off; a goal that is missed is no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import ROOT
from benchmarks.gpu.report import markdown
from megatron.errors import ConfigError, run_command

WORK = ROOT / "build" / "gpu-check"
RESULTS = ROOT / "benchmarks" / "results"
MINUTES = 8.8


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        limit: seconds that it may take.
        rehearsed: whether it runs once beforehand, without measuring.
    """

    name: str
    limit: float
    rehearsed: bool = False


# Those of a phase run at the same time; they measure nothing, or are alone.
PHASES: tuple[tuple[Section, ...], ...] = (
    (Section("machine", 60),),
    (Section("build", 100),),
    (Section("tests", 130), Section("sanitizer", 130), Section("agreement", 130)),
    (Section("kernels", 130, rehearsed=True),),
    (Section("training", 400, rehearsed=True),),
)
REHEARSALS = (1, 2)  # the phases beside which there are some: begun with one, ended with the other
REHEARSED = 165.0  # seconds
SECTIONS = [section.name for phase in PHASES for section in phase]
# What is kept back for each phase that is still to come, so that the last ones get their turn.
KEPT_BACK = {"kernels": 75.0, "training": 220.0}


@dataclass
class Running:
    """A section's process."""

    section: Section
    process: subprocess.Popen[bytes]
    findings: Path
    started: float
    deadline: float
    rehearse: bool = False
    cut_off: bool = False

    @property
    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self.started


@dataclass
class Check:
    """The whole run, and what it has found."""

    only: Sequence[str]
    smoke: bool
    out: Path
    deadline: float
    found: dict[str, Any] = field(default_factory=lambda: {"sections": {}})

    def run(self) -> bool:
        """Every phase; whether all sections ended well."""
        first, last = REHEARSALS
        rehearsals: list[Running] = []
        for number, phase in enumerate(PHASES):
            later = [each for others in PHASES[number + 1 :] for each in others]
            if number == first and self._has_one_of(PHASES[last]):
                rehearsed = [each for each in later if each.rehearsed and each.name in self.only]
                rehearsals = [self._start(each, later, rehearse=True) for each in rehearsed]
            running = [self._start(each, later) for each in phase if each.name in self.only]
            self._wait([*running, *rehearsals] if number == last else running)
            if self.path is None:
                raise ConfigError(self.found["sections"]["machine"]["last_words"][-1])
        states = [each["state"] for each in self.found["sections"].values()]
        return all(state == "done" for state in states)

    def _has_one_of(self, phase: Sequence[Section]) -> bool:
        return any(section.name in self.only for section in phase)

    def _start(
        self, section: Section, later: Sequence[Section], *, rehearse: bool = False
    ) -> Running:
        kept = sum(KEPT_BACK.get(each.name, 0.0) for each in later if each.name in self.only)
        left = self.deadline - time.monotonic() - kept
        seconds = max(min(REHEARSED if rehearse else section.limit, left), 5.0)
        stem = f"{section.name}-rehearsal" if rehearse else section.name
        findings = WORK / f"{stem}.json"
        findings.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu.section", section.name]
        command += [str(findings), f"{seconds:.0f}"]
        command += ["--smoke"] * self.smoke + ["--rehearse"] * rehearse
        with (WORK / f"{stem}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        now = time.monotonic()
        # The section itself stops in time where it can.
        return Running(section, process, findings, now, now + seconds + 5.0, rehearse)

    def _wait(self, running: Sequence[Running]) -> None:
        """Until all have ended; those that take too long are ended."""
        waiting = list(running)
        try:
            while waiting:
                for each in list(waiting):
                    if each.process.poll() is None and time.monotonic() > each.deadline:
                        each.cut_off = True
                        _end(each)
                    if each.process.poll() is not None:
                        waiting.remove(each)
                        _end(each)
                        if not each.rehearse:
                            self._take_down(each)
                time.sleep(0.05)
        finally:
            for each in waiting:
                _end(each)

    def _take_down(self, each: Running) -> None:
        name, code = each.section.name, each.process.returncode
        state = "cut off" if each.cut_off else "done" if code == 0 else "failed"
        section: dict[str, Any] = {"state": state, "seconds": round(each.seconds, 1)}
        if state != "done":
            log = each.findings.with_suffix(".log").read_text(errors="replace")
            section["last_words"] = log.strip().splitlines()[-5:] or ["no words"]
        self.found["sections"][name] = section
        if each.findings.exists():
            self.found[name] = json.loads(each.findings.read_text())
        print(f"{name}: {state} after {each.seconds:.0f} s", flush=True)
        for line in section.get("last_words", []):
            print(f"    {line}", flush=True)
        self.write()

    @property
    def path(self) -> Path | None:
        """Where the findings go, without the suffix; None until the GPU's name is known."""
        name = self.found.get("machine", {}).get("name")
        return None if name is None else self.out / f"gpu-{short_name(name)}"

    def write(self) -> None:
        """The findings so far, as JSON and as a table."""
        if self.path is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            findings = json.dumps(self.found, indent=1) + "\n"
            self.path.with_suffix(".json").write_text(findings)
            self.path.with_suffix(".md").write_text(markdown(self.found))


def short_name(name: str) -> str:
    """A GPU's name as part of a file's: "NVIDIA H100 80GB HBM3" becomes h100-80gb-hbm3."""
    words = re.findall(r"[a-z0-9]+", name.lower().removeprefix("nvidia "))
    return "-".join(words)


def _end(each: Running) -> None:
    """End what is left of a section: its process and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(each.process.pid, signal.SIGKILL)
    each.process.wait()


def parse_arguments() -> argparse.Namespace:
    """What to run, for how long, and where to write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", help="sections, parted by commas; the machine is always there", metavar="NAMES"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="limit of all of it; default %(default)s"
    )
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a trial on the CPU at tiny sizes, without a GPU"
    )
    return parser.parse_args()


def main() -> int:
    """Run the check; 0 where every section ended well."""
    options = parse_arguments()
    only = options.only.split(",") if options.only else SECTIONS
    strangers = [name for name in only if name not in SECTIONS]
    if strangers:
        raise ConfigError(f"--only {','.join(strangers)}: the sections are {', '.join(SECTIONS)}")
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("this Python has no PyTorch: put one that has on the PATH as python3")
    WORK.mkdir(parents=True, exist_ok=True)
    check = Check(
        only=["machine", *only],
        smoke=options.smoke,
        out=options.out or (WORK if options.smoke else RESULTS),
        deadline=time.monotonic() + 60 * options.minutes,
    )
    well = check.run()
    assert check.path is not None
    print(f"\n{markdown(check.found)}\nwritten to {check.path}.json and {check.path}.md")
    return 0 if well else 1


if __name__ == "__main__":
    run_command(main)
