"""Runs every kernel on small inputs in every format, for a checker of races or memory to watch.

    python -m benchmarks.gpu.every_kernel cuda [float32 float16 bfloat16]

Prints the launchers that it has reached, one to a line.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.contests import backward_action, forward_action
from benchmarks.gpu.kernels import CASES, Case, Draw
from megatron.ops import kernels


def run_all(device: str, dtypes: Sequence[torch.dtype]) -> set[str]:
    """The names of the launchers that were called."""
    reached: set[str] = set()
    launch = kernels.launch

    def noting(name: str, *arguments: Any) -> None:
        reached.add(name)
        launch(name, *arguments)

    kernels.launch = noting
    try:
        with kernels.using("cuda" if device == "cuda" else "emulated", device):
            for dtype in dtypes:
                for case, tiny in itertools.product(CASES, (0, 1)):
                    _run(case, Draw(device, tiny=tiny, dtype=dtype))
    finally:
        kernels.launch = launch
    return reached


def _run(case: Case, draw: Draw) -> None:
    forward_action(case.ours, case.draw(draw))()
    if case.moved_back is not None:
        backward_action(case.ours, case.draw(draw))()


if __name__ == "__main__":
    device, *formats = sys.argv[1:]
    chosen = [getattr(torch, name) for name in formats] or list(kernels.FORMATS)
    print("\n".join(sorted(run_all(device, chosen))))
