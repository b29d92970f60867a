"""The kernels' resource report: what it says of the kernels, and that it sees what is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.ops.build import SOURCES, cuda_sources
from tools import kernel_report
from tools.kernel_report import (
    ARCHITECTURES,
    Compiler,
    Nvrtc,
    compile_all,
    find_compilers,
    kernels_of,
    read_report,
    readable,
)

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = find_compilers()
PACKAGED = [compiler for compiler in COMPILERS if isinstance(compiler, Nvrtc)]

needs_compiler = pytest.mark.skipif(
    not COMPILERS, reason="neither nvcc nor the packages of the extra `kernels` are here"
)

needs_packages = pytest.mark.skipif(
    not PACKAGED, reason="the packages of the extra `kernels` are not here"
)

SPILLING = """
#include "dispatch.cuh"
namespace megatron { namespace {
__global__ void __launch_bounds__(32) wanders(const float* x, float* y, int64_t n) {
  float row[600];
  for (int64_t i = 0; i < n; i++) row[(i * 7 + threadIdx.x) % 600] = x[i];
  for (int64_t i = 0; i < n; i++) y[i] = row[static_cast<int>(x[i]) % 600];
}
} }
EXPORT int wander(const void* x, void* y, int64_t n, megatron::Stream stream) {
  using namespace megatron;
  return launch(wanders, dim3(1), dim3(32), 0, stream, static_cast<const float*>(x),
                static_cast<float*>(y), n);
}
"""

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_80'
ptxas info    : Function properties for _Z5firstPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 2048 bytes smem, 372 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_80'
ptxas info    : Function properties for _Z6secondPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "kernel_report.py", *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


@needs_packages
def test_no_kernel_spills() -> None:
    kernels, failures = compile_all(cuda_sources(), ARCHITECTURES)
    assert failures == []
    for architecture in ARCHITECTURES:
        own = [kernel for kernel in kernels if kernel.architecture == architecture]
        assert {kernel.source for kernel in own} == {path.name for path in cuda_sources()}
    assert [kernel for kernel in kernels if not kernel.is_clean] == []


@needs_packages
def test_packs_are_stored_by_one_instruction() -> None:
    # The compiler may take a pack apart, which the memory system pays for.
    stores: dict[tuple[str, str], list[set[str]]] = {}
    for path in cuda_sources():
        ptx = PACKAGED[0].ptx(path, min(ARCHITECTURES)).decode()
        for found in re.finditer(r"\.entry (\w+)\((.*?)^\}", ptx, re.MULTILINE | re.DOTALL):
            kernel = path.name, readable(found[1]).partition("<")[0]
            kinds = set(re.findall(r"st\.global\.(v4|u16|b16)", found[2]))
            stores.setdefault(kernel, []).append(kinds)
    # Rows of logits begin anywhere; sums over rows are the results of many threads each.
    apart = {("cross_entropy.cu", "differentiate"), ("column_sums.cu", "sum_columns")}
    for kernel, kinds_of_instances in stores.items():
        halves = [kinds for kinds in kinds_of_instances if kinds & {"u16", "b16"}]
        if halves and kernel not in apart:
            assert any(kinds == {"v4"} for kinds in kinds_of_instances), kernel
            assert not any("v4" in kinds for kinds in halves), kernel
    assert {"v4"} <= set().union(*stores["cross_entropy.cu", "differentiate"])


def test_every_kernel_says_how_many_threads_it_has() -> None:
    # The compiler then keeps to the registers that so many threads can have; without, a launch may
    # fail on the GPU.
    for path in cuda_sources():
        kernels = re.findall(r"__global__\s+void\s+(\w+)", path.read_text())
        assert set(kernels) <= {"__launch_bounds__"}, path.name


@needs_compiler
@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda c: type(c).__name__)
def test_what_wanders_through_memory_is_noticed(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_report, "KEPT", tmp_path / "kept")
    source = tmp_path / "wander.cu"
    source.write_text(SPILLING)
    for _ in range(2):  # the second report is the one that was kept
        (kernel,) = kernels_of(source, 80, compiler)
        assert kernel.name == "wanders"
        assert kernel.stack >= 2400
        assert not kernel.is_clean
    assert len(list((tmp_path / "kept").glob("*.txt"))) == 1


@needs_compiler
@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda c: type(c).__name__)
def test_compilers_find_the_same_kernels(compiler: Compiler) -> None:
    source = SOURCES / "column_sums.cu"
    names = {kernel.name for kernel in kernels_of(source, 90, compiler)}
    assert names == {f"sum_columns<{format}>" for format in ("float", "half", "bf16")}


@needs_compiler
def test_the_exit_code_tells(tmp_path: Path) -> None:
    spilling, broken = tmp_path / "spilling.cu", tmp_path / "broken.cu"
    spilling.write_text(SPILLING)
    broken.write_text('#include "dispatch.cuh"\nEXPORT int f() { return nowhere; }\n')
    written = tmp_path / "found.json"

    good = _run(SOURCES / "column_sums.cu", "--arch", 90, "--json", written)
    assert good.returncode == 0, good.stderr
    assert len(json.loads(written.read_text())["kernels"]) == 3

    found = _run(spilling, broken, SOURCES / "column_sums.cu", "--arch", 90)
    assert found.returncode == 1
    assert "wanders of spilling.cu for sm_90 keeps" in found.stdout
    assert "broken.cu does not compile for sm_90" in found.stdout
    assert "nowhere" in found.stdout
    assert "4 kernels, 1 of them not clean" in found.stdout


def test_what_nobody_can_compile_is_one_line() -> None:
    found = _run("--arch", 20)
    assert found.returncode == 2
    assert found.stderr.startswith("error: --arch 20: no compiler here knows it")
    assert _run("nowhere.cu").stderr == "error: nowhere.cu is no file\n"


def test_a_report_is_read() -> None:
    first, second = read_report(PTXAS, "x.cu", 80)
    assert (first.registers, first.shared, first.stack, first.spilled) == (32, 2048, 0, 0)
    assert (second.registers, second.shared, second.stack, second.spilled) == (255, 0, 16, 20)
    assert first.is_clean and not second.is_clean


def test_names_are_readable() -> None:
    mangled = (
        "_ZN8megatron46_GLOBAL__N__c283e578_13_activation_cu_6db88f068activate"
        "INS0_4GeluEfLi4ELb1EEEvPKT0_S5_PS3_ll"
    )
    assert readable(mangled) == "activate<Gelu, float, 4, true>"
    assert readable("not mangled") == "not mangled"


@needs_packages
def test_the_packages_know_the_oldest_architecture() -> None:
    assert PACKAGED[0].knows(min(ARCHITECTURES))
