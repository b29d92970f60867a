"""The emulator shows what is wrong with a kernel: barriers that lack, or that lack threads."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron.ops.build import EMULATOR, SOURCES

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
PROGRAM = r"""
#include "platform.cuh"
#include "reduce.cuh"
using namespace megatron;

// The numbers of the block's threads, of the last one first. Wrong without the barrier.
template <bool kWaits>
__global__ void reverse(int* to) {
  __shared__ int numbers[96];
  numbers[threadIdx.x] = threadIdx.x;
  if (kWaits) __syncthreads();
  to[blockIdx.x * 96 + threadIdx.x] = numbers[95 - threadIdx.x];
  __syncthreads();
  numbers[threadIdx.x] = -1;
}

__global__ void half_waits(int*) {
  if (threadIdx.x < 48) __syncthreads();
}

__global__ void half_a_warp_exchanges(int* to) {
  if (threadIdx.x < 16) *to = __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void warp_sums(int* to) {
  int sum = over_warp<Sum>(static_cast<int>(threadIdx.x));
  to[threadIdx.x] = sum + __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 3);
}

int main(int, char** arguments) {
  void (*kernels[])(int*) = {reverse<true>, reverse<false>, half_waits, half_a_warp_exchanges,
                             warp_sums};
  static int found[3 * 96] = {};
  launch(kernels[std::atoi(arguments[1])], dim3(3), dim3(96), 0, nullptr, found);
  for (int x : found) std::printf("%d ", x);
}
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("emulator")
    source, made = directory / "program.cc", directory / "program"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-DMEGATRON_EMULATED", "-U_FORTIFY_SOURCE", "-w"]
    places = [f"-I{SOURCES}", f"-I{EMULATOR}"]
    command = [str(COMPILER), *flags, *places, str(source), "-o", str(made)]
    subprocess.run(command, check=True)
    return made


def run(program: Path, kernel: int, seed: int = 0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MEGATRON_EMULATOR_SEED": str(seed)}
    command = [str(program), str(kernel)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def numbers(done: subprocess.CompletedProcess[str]) -> list[int]:
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("seed", range(5))
def test_a_barrier_is_waited_at(program: Path, seed: int) -> None:
    assert numbers(run(program, 0, seed)) == [95 - i for i in range(96)] * 3


def test_a_missing_barrier_shows(program: Path) -> None:
    found = [numbers(run(program, 1, seed)) for seed in range(3)]
    assert any(each != found[0] for each in found)


@pytest.mark.parametrize("kernel", [2, 3])
def test_waiting_for_who_never_comes_is_an_error(program: Path, kernel: int) -> None:
    done = run(program, kernel)
    assert done.returncode != 0
    assert "some threads wait at a barrier that others never reach" in done.stderr


@pytest.mark.parametrize("seed", range(5))
def test_a_warp_exchanges_its_own_numbers(program: Path, seed: int) -> None:
    found = numbers(run(program, 4, seed))[:96]
    for warp in range(3):
        own = range(32 * warp, 32 * warp + 32)
        assert found[32 * warp : 32 * warp + 32] == [sum(own) + own[3]] * 32
