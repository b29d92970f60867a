"""The GPU and its two limits: how fast it copies memory, how fast it multiplies matrices."""

from __future__ import annotations

import platform
import shutil
import subprocess
from functools import partial

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.measuring import Action, Stopwatch, contest
from benchmarks.gpu.report import TRIAL

MATRIX = 8192
COPIED = 2**30  # bytes of a tensor
ROUNDS = 9


def run(context: Context) -> None:
    """Names the machine, measures its limits."""
    context.record("name", TRIAL)
    context.record("torch", torch.__version__)
    context.record("python", platform.python_version())
    if not context.smoke:
        properties = torch.cuda.get_device_properties(0)
        context.record("name", properties.name)
        context.record("capability", [properties.major, properties.minor])
        context.record("memory_gib", properties.total_memory / 2**30)
        context.record("multiprocessors", properties.multi_processor_count)
        context.record("cuda", torch.version.cuda)
        context.record("driver", _driver())
    copied, matrix, rounds = (2**16, 64, 1) if context.smoke else (COPIED, MATRIX, ROUNDS)
    limits = {
        "copy": copies(copied, context.device_type),
        "product": products(matrix, context.device_type),
    }
    times = contest(limits, Stopwatch(context.device_type), rounds)
    context.record("copy_gb_per_second", 2 * copied / times["copy"].median / 1e9)
    context.record("matmul_tflops", 2.0 * matrix**3 / times["product"].median / 1e12)


def copies(size: int, device: str) -> list[Action]:
    """Copies of `size` bytes of random numbers within the device's memory."""
    pairs = [torch.randint(256, (2, size), dtype=torch.uint8, device=device) for _ in range(2)]
    return [partial(to.copy_, source) for to, source in pairs]


def products(size: int, device: str) -> list[Action]:
    """Products of two square matrices of random bfloat16 numbers; zeros would be faster."""
    matrices = torch.randn(2, 2, size, size, dtype=torch.bfloat16, device=device)
    return [partial(torch.matmul, left, right) for left, right in matrices]


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"
