"""Compiles `csrc/cuda/` into a shared library, for a GPU or for the emulator, once.

The library is kept under a name made of all that it was made from, in `build/kernels/` beside the
sources or where MEGATRON_KERNELS_DIR says. Of several processes that want it one compiles and the
others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
EMULATOR = ROOT / "csrc" / "emulation"


class BuildError(Exception):
    """The kernels cannot be compiled here; says why."""


def build_cuda(capability: tuple[int, int]) -> Path:
    """The library for GPUs of a compute capability, such as (9, 0).

    Raises:
        BuildError: there is no nvcc, it does not know such GPUs, or it fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was not found: put it on the PATH or set CUDA_HOME")
    number = "{}{}".format(*capability)
    target = f"arch=compute_{number},code=sm_{number}"
    command = [nvcc, "-std=c++17", "-O3", "-gencode", target, "-Xcompiler", "-fPIC"]
    return _build(f"sm{number}", command, [nvcc, "-shared", "-gencode", target])


def build_emulated() -> Path:
    """The library that runs the kernels on the CPU (`csrc/emulation/emulator.h`).

    With MEGATRON_EMULATOR_CHECKED=1 in the environment every access to memory is checked by the
    compiler's address sanitizer, which the process must be started with: LD_PRELOAD=libasan.so.

    Raises:
        BuildError: there is no C++ compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("a C++ compiler was not found: put g++ on the PATH or set CXX")
    checked = os.environ.get("MEGATRON_EMULATOR_CHECKED") == "1"
    checks = ["-fsanitize=address", "-O1"] if checked else []
    # Without the check of longjmp that it goes up the stack: the emulator's go to another one.
    quiet = ["-Wno-unknown-pragmas", "-Wno-unused", "-U_FORTIFY_SOURCE"]
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-DMEGATRON_EMULATED", "-xc++", *quiet]
    kind = "checked" if checked else "emulated"
    return _build(kind, [*command, *checks], [compiler, "-shared", *checks])


def find_nvcc() -> str | None:
    """The CUDA compiler, on the PATH or where CUDA_HOME says."""
    home = os.environ.get("CUDA_HOME", os.environ.get("CUDA_PATH"))
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home or '/usr/local/cuda'}/bin")


def cuda_sources() -> list[Path]:
    """The files that are compiled, each by itself."""
    return sorted(SOURCES.glob("*.cu"))


def _build(kind: str, compile_command: Sequence[str], link_command: Sequence[str]) -> Path:
    sources = cuda_sources()
    if not sources:
        raise BuildError(f"the kernels' sources are not in {SOURCES}")
    directory = Path(os.environ.get("MEGATRON_KERNELS_DIR", ROOT / "build" / "kernels"))
    library = directory / f"{kind}-{_fingerprint(compile_command)}.so"
    if library.exists():
        return library
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _only_one(directory / f"{kind}.lock"):
            if not library.exists():
                _compile(sources, compile_command, link_command, library)
    except OSError as error:
        raise BuildError(f"{directory}: {error.strerror}; set MEGATRON_KERNELS_DIR") from error
    return library


def _fingerprint(command: Sequence[str]) -> str:
    """A name for all that a library is made from: sources, compiler and flags."""
    digest = hashlib.sha256("\0".join([*command, _version(command[0])]).encode())
    for path in sorted([*SOURCES.iterdir(), *EMULATOR.iterdir()]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def _compile(
    sources: Sequence[Path],
    compile_command: Sequence[str],
    link_command: Sequence[str],
    library: Path,
) -> None:
    print(f"compiling {len(sources)} files of kernels into {library}, once", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = [str(Path(scratch, f"{source.stem}.o")) for source in sources]
        commands = [
            [*compile_command, "-c", str(source), "-o", made]
            for source, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        linked = Path(scratch, library.name)
        _run([*link_command, *objects, "-o", str(linked)])
        linked.rename(library)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise BuildError("{} failed: {}".format(Path(command[0]).name, "; ".join(errors[:3])))


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
