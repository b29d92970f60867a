"""A dry run of every launch script, whole and through the shell, with a table at the end.

    python -m tests.examples.full --hardware h100-sxm

Ends with 0 where all scripts run, count the parameters that building the model counts, and fit the
hardware's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.examples.published import by_size, parameters, run


@dataclass(frozen=True)
class DryRun:
    """What became of one script: its plan, or what it said instead."""

    script: str
    seconds: float
    plan: dict[str, Any] | None
    said: str

    @property
    def verdict(self) -> str:
        """What is wrong, or that it fits."""
        if self.plan is None:
            return f"FAILS: {self.said}"
        if self.plan["model"]["parameters"] != parameters(self.script):
            return "FAILS: counts other parameters"
        return "fits" if self.plan["fits"] else "FAILS: does not fit"

    def row(self) -> str:
        """A line of the table."""
        if self.plan is None:
            return f"{self.script:14} {'':33} {self.seconds:7.1f} s  {self.verdict}"
        step = self.plan["step"]
        peak = max(rank["peak_bytes"] for rank in self.plan["ranks"]) / 2**30
        return (
            f"{self.script:14} {self.plan['cluster']['gpus']:5} {peak:8.2f} {step['seconds']:9.3f} "
            f"{step['model_tflops_per_second_per_gpu']:8.1f} {self.seconds:7.1f} s  {self.verdict}"
        )


def dry_run(script: str, hardware: str) -> DryRun:
    """Run one script dry."""
    with tempfile.TemporaryDirectory() as directory:
        plan = Path(directory) / "plan.json"
        given = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HARDWARE": hardware}
        home = {name: os.environ[name] for name in ("HOME", "PYTHONPATH") if name in os.environ}
        begin = time.monotonic()
        done = run(script, "--dry-run-json", str(plan), DRY_RUN="1", **given, **home)
        seconds = time.monotonic() - begin
        found = json.loads(plan.read_text()) if done.returncode == 0 else None
    return DryRun(script, seconds, found, done.stderr.strip())


def main() -> int:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(description="Run every launch script dry.")
    parser.add_argument("--hardware", default="h100-sxm")
    hardware = parser.parse_args().hardware
    print(f"{hardware}: GPUs, peak GiB of one, seconds and TFLOP/s per GPU of a step; planned in")
    verdicts = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(partial(dry_run, hardware=hardware), by_size()):
            print(done.row(), flush=True)
            verdicts.append(done.verdict)
    wrong = sum(verdict != "fits" for verdict in verdicts)
    print(f"{len(verdicts)} scripts, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
