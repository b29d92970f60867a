"""No kernel reads or writes where it must not.

The emulated kernels run once more in a process in which the address sanitizer checks every access:
beyond a tensor's end or before its begin lies memory that nobody may touch.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from megatron.ops.build import build_emulated, cuda_sources
from tests.ops.kernel_cases import ON_GPU

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
BEYOND_THE_END = """
import torch
from megatron.ops import kernels
with kernels.using("emulated"):
    x, y = torch.randn(3, 8), torch.empty(2, 8)
    kernels.launch("bias_activation_forward", x, None, y, 3, 8, 0, False, x.dtype)
"""


def _library(name: str) -> str:
    assert COMPILER is not None
    found = subprocess.run(
        [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def _checked(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Built beforehand, so that the sanitizer need not watch the compiler, too.
    with mock.patch.dict(os.environ, MEGATRON_EMULATOR_CHECKED="1"):
        build_emulated()
    environment = os.environ | {
        "LD_PRELOAD": _library("libasan.so"),
        # What torch holds to its end is no leak; fibers of the emulator confuse one check.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "MEGATRON_EMULATOR_CHECKED": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


pytestmark = [
    pytest.mark.skipif(
        COMPILER is None or not Path(_library("libasan.so")).is_absolute(),
        reason="there is no C++ compiler with an address sanitizer",
    ),
    pytest.mark.skipif(ON_GPU, reason="where there is a GPU, its own checker watches the kernels"),
]


def test_a_write_beyond_the_end_is_found() -> None:
    done = _checked("-c", BEYOND_THE_END)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_kernels_stay_within_their_tensors() -> None:
    """All of them, at sizes that are whole packs and at others, in the format of most to a pack."""
    done = _checked("-m", "benchmarks.gpu.every_kernel", "cpu", "bfloat16")
    assert done.returncode == 0, done.stderr[-4000:]
    launchers = re.findall(r"^EXPORT int (\w+)", "".join(map(Path.read_text, cuda_sources())), re.M)
    assert sorted(launchers) == done.stdout.split()
