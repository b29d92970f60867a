"""What the CUDA kernels take of a GPU, as the compiler reports it, and whether any spills.

    python tools/kernel_report.py --arch 70 80 90 100

Each file of `csrc/cuda/` is compiled for each architecture, by nvcc where it is found and knows
the architecture, otherwise by NVRTC and ptxas of the extra `kernels`
(`pip install megatron-parity[kernels]`), which know everything from 5.0 to 12.1. No GPU is needed.
A kernel that keeps something in local memory, for which registers spill or an array is indexed at
run time, or a file that does not compile makes the exit code 1.

Reports are kept in `build/kernel-report/` under names made of all that they were made from.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import ConfigError, run_command
from megatron.ops.build import ROOT, SOURCES, cuda_sources, find_nvcc

ARCHITECTURES = (70, 80, 90, 100)
KEPT = ROOT / "build" / "kernel-report"
_STANDARD = "-std=c++17"
_BYTES = ("shared", "stack", "spilled")


class CompileError(ConfigError):
    """A file does not compile; says why."""


@dataclass(frozen=True)
class Kernel:
    """What a kernel takes: registers of a thread, and bytes of a block or a thread."""

    source: str
    architecture: int
    name: str
    registers: int
    shared: int
    stack: int
    spilled: int

    @property
    def is_clean(self) -> bool:
        """Whether it keeps everything in registers and shared memory."""
        return self.stack == 0 and self.spilled == 0


class Compiler(Protocol):
    """Compiles device code and passes on what ptxas reports."""

    version: str

    def knows(self, architecture: int) -> bool:
        """Whether it compiles for compute capability `architecture` / 10."""

    def report(self, source: Path, architecture: int) -> str:
        """The words of `ptxas -v`; raises CompileError."""


class Nvcc:
    """The CUDA toolkit's compiler, as the project itself uses it."""

    def __init__(self, program: str) -> None:
        self._program = program
        self.version = _output([program, "--version"])
        self._known = set(re.findall(r"compute_(\d+)", _output([program, "--list-gpu-arch"])))

    def knows(self, architecture: int) -> bool:
        """Whether it compiles for compute capability `architecture` / 10."""
        return str(architecture) in self._known

    def report(self, source: Path, architecture: int) -> str:
        """The words of `ptxas -v`; raises CompileError."""
        with tempfile.TemporaryDirectory() as scratch:
            target = [f"-arch=sm_{architecture}", "-cubin", "-o", f"{scratch}/made.cubin"]
            options = [_STANDARD, "-O3", "-Xptxas", "-v", "-I", str(SOURCES)]
            return _output([self._program, *options, *target, str(source)])


class Nvrtc:
    """CUDA's run-time compiler and ptxas, from Python packages; for device code alone."""

    def __init__(self, directory: Path) -> None:
        self._ptxas = str(directory / "cuda_nvcc" / "bin" / "ptxas")
        self._headers = [
            directory / "cuda_runtime" / "include",
            directory / "cuda_nvcc" / "include",
        ]
        self._library = ctypes.CDLL(str(next(directory.glob("cuda_nvrtc/lib/libnvrtc.so.*"))))
        self.version = "NVRTC " + _output([self._ptxas, "--version"])

    def knows(self, architecture: int) -> bool:
        """Whether it compiles for compute capability `architecture` / 10."""
        count = ctypes.c_int()
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", known)
        return architecture in known

    def report(self, source: Path, architecture: int) -> str:
        """The words of `ptxas -v`; raises CompileError."""
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch, "made.ptx")
            made.write_bytes(self.ptx(source, architecture))
            options = ["-v", f"-arch=sm_{architecture}", "-o", f"{scratch}/made.cubin"]
            return _output([self._ptxas, *options, str(made)])

    def ptx(self, source: Path, architecture: int) -> bytes:
        """What ptxas assembles, kept as reports are; raises CompileError."""
        path = KEPT / f"{source.stem}-{architecture}-{_fingerprint(source, self)}.ptx"
        if path.exists():
            return path.read_bytes()
        made = self._compiled(source, architecture)
        _keep(made, path)
        return made

    def _compiled(self, source: Path, architecture: int) -> bytes:
        options = [
            f"--gpu-architecture=compute_{architecture}",
            f"-{_STANDARD}",
            # The launchers have no marks of device code, which is all that there is here.
            "-default-device",
            *(f"-I{directory}" for directory in (source.parent, SOURCES, *self._headers)),
        ]
        program = ctypes.c_void_p()
        text, name = source.read_bytes(), source.name.encode()
        self._call("CreateProgram", ctypes.byref(program), text, name, 0, None, None)
        try:
            passed = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if self._library.nvrtcCompileProgram(program, len(options), passed):
                raise CompileError(_errors(self._text(program, "ProgramLog").decode()))
            return self._text(program, "PTX")
        finally:
            self._call("DestroyProgram", ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.value

    def _call(self, function: str, *arguments: object) -> None:
        error = getattr(self._library, f"nvrtc{function}")(*arguments)
        assert error == 0, f"nvrtc{function} returned {error}"


def find_compilers() -> list[Compiler]:
    """The compilers that are here, the preferred one first."""
    nvcc, packages = find_nvcc(), _packages()
    found: list[Compiler] = [] if nvcc is None else [Nvcc(nvcc)]
    return found if packages is None else [*found, Nvrtc(packages)]


def _packages() -> Path | None:
    """Where the packages of the extra `kernels` are, if they all are."""
    spec = importlib.util.find_spec("nvidia")
    parts = ("cuda_nvrtc/lib", "cuda_nvcc/bin/ptxas", "cuda_runtime/include/cuda_fp16.h")
    for place in [] if spec is None else spec.submodule_search_locations or []:
        if all(Path(place, part).exists() for part in parts):
            return Path(place)
    return None


def compiler_for(architecture: int, compilers: Sequence[Compiler]) -> Compiler:
    """The first that compiles for the architecture; raises ConfigError."""
    for compiler in compilers:
        if compiler.knows(architecture):
            return compiler
    raise ConfigError(
        f"--arch {architecture}: no compiler here knows it; install nvcc or the extra `kernels`"
    )


def kernels_of(source: Path, architecture: int, compiler: Compiler) -> list[Kernel]:
    """The kernels of a file; raises CompileError."""
    path = KEPT / f"{source.stem}-{architecture}-{_fingerprint(source, compiler)}.txt"
    if path.exists():
        report = path.read_text()
    else:
        report = compiler.report(source, architecture)
        _keep(report.encode(), path)
    return read_report(report, source.name, architecture)


def _fingerprint(source: Path, compiler: Compiler) -> str:
    digest = hashlib.sha256(compiler.version.encode())
    for path in (source, Path(__file__), *sorted(SOURCES.glob("*.cuh"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _keep(made: bytes, path: Path) -> None:
    aside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(made)
        aside.replace(path)
    except OSError as error:
        print(f"reports are not kept: {error}", file=sys.stderr)


_PROPERTIES = re.compile(
    r"Compiling entry function '(?P<name>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame"
    r", (?P<stores>\d+) bytes spill stores"
    r", (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def read_report(report: str, source: str, architecture: int) -> list[Kernel]:
    """The kernels that ptxas speaks of."""
    kernels = []
    for found in _PROPERTIES.finditer(report):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        kernels.append(
            Kernel(
                source=source,
                architecture=architecture,
                name=readable(found["name"]),
                registers=int(found["registers"]),
                shared=int(shared[1]) if shared else 0,
                stack=int(found["stack"]),
                spilled=int(found["stores"]) + int(found["loads"]),
            )
        )
    return kernels


def readable(mangled: str) -> str:
    """A kernel's name with its template arguments, such as activate<Gelu, bf16, 8, true>."""
    name = re.sub(r"megatron::|\(anonymous namespace\)::|^void ", "", _demangled(mangled))
    name = name.replace("__nv_bfloat16", "bf16").replace("__half", "half")
    name = re.sub(r"\((?:int|bool|long|unsigned int)\)(?=[\d-]|true|false)", "", name)
    # What is left of the parameters begins with the bracket that closes at the end.
    depth = 0
    for place in range(len(name) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(name[place], 0)
        if depth == 0:
            return name[:place] if name.endswith(")") else name
    return name


@functools.cache
def _demangler() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libstdc++.so.6")
    except OSError:
        return None
    library.__cxa_demangle.restype = ctypes.c_void_p
    return library


def _demangled(name: str) -> str:
    library = _demangler()
    if library is None:
        return name
    status = ctypes.c_int()
    made = library.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if not made:
        return name
    text = ctypes.string_at(made).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(made))
    return text


def _output(command: Sequence[str]) -> str:
    """What a compiler writes; raises CompileError."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    words = done.stdout + done.stderr
    if done.returncode:
        raise CompileError(_errors(words))
    return words


def _errors(words: str) -> str:
    """The lines that say what is wrong."""
    lines = words.strip().splitlines()
    return "; ".join([line.strip() for line in lines if "error" in line.lower()][:3] or lines[:3])


def compile_all(
    sources: Sequence[Path], architectures: Sequence[int]
) -> tuple[list[Kernel], list[str]]:
    """All kernels, and a line for each file and architecture that fails; raises ConfigError."""
    compilers = find_compilers()
    chosen = {architecture: compiler_for(architecture, compilers) for architecture in architectures}

    def work(job: tuple[Path, int]) -> list[Kernel] | str:
        source, architecture = job
        try:
            found = kernels_of(source, architecture, chosen[architecture])
        except CompileError as error:
            return f"{source.name} does not compile for sm_{architecture}: {error}"
        return found or f"{source.name} has no kernel for sm_{architecture}"

    # The longest first, so that no core is left alone with one of them.
    ordered = sorted(sources, key=lambda source: source.stat().st_size, reverse=True)
    jobs = [(source, architecture) for source in ordered for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(work, jobs))
    kernels = [kernel for result in results if isinstance(result, list) for kernel in result]
    return kernels, [result for result in results if isinstance(result, str)]


def table(kernels: Iterable[Kernel], architectures: Sequence[int]) -> str:
    """A row for each kernel: registers for each architecture, the rest at its largest."""
    grouped: dict[tuple[str, str], dict[int, Kernel]] = {}
    for kernel in kernels:
        grouped.setdefault((kernel.source, kernel.name), {})[kernel.architecture] = kernel
    columns = [f"sm_{architecture}" for architecture in architectures]
    rows = [("", ["registers", *[""] * (len(columns) - 1), "bytes", "", ""])]
    rows.append(("kernel", [*columns, *_BYTES]))
    source = ""
    for (own_source, name), each in sorted(grouped.items()):
        if own_source != source:
            source = own_source
            rows.append((source, []))
        registers = [str(each[a].registers) if a in each else "–" for a in architectures]
        largest = [max(getattr(k, what) for k in each.values()) for what in _BYTES]
        rows.append((f"  {name}", [*registers, *map(str, largest)]))
    width = max(len(name) for name, _ in rows)
    lines = [name.ljust(width) + "".join(f"{c:>10}" for c in cells) for name, cells in rows]
    return "\n".join(line.rstrip() for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("sources", nargs="*", type=Path, help="files; all of csrc/cuda by default")
    parser.add_argument(
        "--arch", nargs="+", type=int, default=ARCHITECTURES, help="70 is compute capability 7.0"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    return parser


def main() -> int:
    """Compile, print the table; 1 where a kernel is not clean or a file does not compile."""
    options = _parser().parse_args()
    for source in options.sources:
        if not source.is_file():
            raise ConfigError(f"{source} is no file")
    kernels, failures = compile_all(options.sources or cuda_sources(), options.arch)
    if options.json is not None:
        found = {"kernels": [asdict(kernel) for kernel in kernels], "failures": failures}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(kernels, options.arch))
    wrong = [kernel for kernel in kernels if not kernel.is_clean]
    for kernel in wrong:
        print(
            f"{kernel.name} of {kernel.source} for sm_{kernel.architecture} keeps "
            f"{kernel.stack} bytes in local memory and spills {kernel.spilled}"
        )
    print("\n".join([*failures, f"{len(kernels)} kernels, {len(wrong)} of them not clean"]))
    return 1 if wrong or failures else 0


if __name__ == "__main__":
    run_command(main)
