"""Compiles the kernels, for the GPU that is here or for the emulator."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu.context import Context
from megatron.ops.build import build_cuda, build_emulated, cuda_sources


def run(context: Context) -> None:
    """Builds; raises BuildError."""
    start = time.perf_counter()
    context.record("files", len(cuda_sources()))
    made = build_emulated() if context.smoke else build_cuda(torch.cuda.get_device_capability())
    context.record("library", made.name)
    context.record("seconds", time.perf_counter() - start)
