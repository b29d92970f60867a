"""Compiles the kernels, for the GPU that is here and for the emulator, which some tests want."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.gpu.context import Context
from megatron.ops.build import build_cuda, build_emulated, cuda_sources


def run(context: Context) -> None:
    """Builds; raises BuildError."""
    start = time.perf_counter()
    context.record("files", len(cuda_sources()))
    with ThreadPoolExecutor() as pool:
        emulated = pool.submit(build_emulated)
        made = (
            emulated.result() if context.smoke else build_cuda(torch.cuda.get_device_capability())
        )
        context.record("library", made.name)
        context.record("seconds", time.perf_counter() - start)
        emulated.result()
