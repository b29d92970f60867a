"""One section of the check in a process of its own.

python -m benchmarks.gpu.section NAME FILE SECONDS [--smoke] [--rehearse]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu import agreement, building, contests, machine, testing, training
from benchmarks.gpu.context import Context

_PR_SET_PDEATHSIG = 1  # in Linux' sys/prctl.h

SECTIONS = {
    "machine": machine.run,
    "build": building.run,
    "tests": testing.run_tests,
    "sanitizer": testing.run_sanitizer,
    "agreement": agreement.run,
    "kernels": contests.run,
    "training": training.run,
}


def main() -> None:
    """Run it; findings go to FILE, words to the standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("file", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if sys.platform == "linux":
        # It has a session of its own, and would outlive a check that is killed.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if options.smoke:
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU here; --smoke tries the check out on a CPU")
    SECTIONS[options.name](
        Context(
            path=options.file,
            smoke=options.smoke,
            rehearse=options.rehearse,
            deadline=time.monotonic() + options.seconds,
        )
    )
    # All is written down; what libraries do as a process ends must not count as a failure.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
