"""The tests that use a GPU where there is one, and NVIDIA's checkers of races and of memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import ROOT, Context

TESTS = ("tests/ops", "tests/gpu")
TESTS_OF_A_TRIAL = ("tests/ops/test_activation.py",)
TOOLS = ("racecheck", "memcheck")
FOUND_SOMETHING = 86  # exit code that the checkers are told to have
NAMED = 20  # failed tests


def run_tests(context: Context) -> None:
    """Runs pytest on each directory at once; raises RuntimeError where a test fails."""
    paths = TESTS_OF_A_TRIAL if context.smoke else TESTS
    present = [path for path in paths if (ROOT / path).exists()]
    reports = [context.path.with_suffix(f".{number}.xml") for number in range(len(present))]

    def run(path: str, report: Path) -> int:
        report.unlink(missing_ok=True)
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        threads = {"OMP_NUM_THREADS": "2"}  # much else is at work
        return _run([sys.executable, "-m", "pytest", *options, path], context, threads)[0]

    with ThreadPoolExecutor() as pool:
        codes = list(pool.map(run, present, reports))
    for key, value in read_reports(report for report in reports if report.exists()).items():
        context.record(key, value)
    bad = [f"{path} with {code}" for path, code in zip(present, codes, strict=True) if code]
    if bad:
        raise RuntimeError(f"pytest ended {', '.join(bad)}")


def read_reports(paths: Iterable[Path]) -> dict[str, Any]:
    """How many tests passed, were skipped and failed; the names of those that failed."""
    cases = [case for path in paths for case in ET.parse(path).iter("testcase")]
    failed = [c for c in cases if any(c.find(kind) is not None for kind in ("failure", "error"))]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": len(failed),
        "failures": [f"{c.get('classname')}::{c.get('name')}" for c in failed][:NAMED],
    }


def run_sanitizer(context: Context) -> None:
    """Every kernel at small sizes under each checker; raises RuntimeError for what it finds.

    Where there is no checker, or it refuses the device, that is recorded, and the kernels run by
    themselves.
    """
    driver = [sys.executable, "-m", "benchmarks.gpu.every_kernel", context.device_type]
    checker = None if context.smoke else find_checker()
    if checker is None:
        context.record("note", "compute-sanitizer is not here; the kernels ran without it")
        # In a trial one format is enough: emulated kernels are slow.
        code, words = _run([*driver, *["bfloat16"] * context.smoke], context)
        context.record("launchers", words.split())
        if code:
            raise RuntimeError(f"the kernels ended with {code}")
        return
    # An allocation that PyTorch keeps for later would hide that a kernel runs past its end.
    memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    chosen = only_ours(checker)

    def check(tool: str) -> tuple[float, str]:
        command = [checker, "--tool", tool, *chosen]
        command += ["--target-processes", "application-only", "--report-api-errors", "no"]
        command += ["--error-exitcode", str(FOUND_SOMETHING), *driver]
        start = time.perf_counter()
        code, words = _run(command, context, memory)
        return time.perf_counter() - start, verdict(code, words)

    with ThreadPoolExecutor() as pool:
        for tool, (seconds, said) in zip(TOOLS, pool.map(check, TOOLS), strict=True):
            context.record(f"{tool}_seconds", seconds)
            context.record(tool, said)
    bad = [tool for tool in TOOLS if context.found[tool].startswith("found")]
    if bad:
        raise RuntimeError(f"{' and '.join(bad)} found something")


def only_ours(checker: str) -> list[str]:
    """Options that keep a checker to this project's kernels, as its version calls them."""
    offered = subprocess.run([checker, "--help"], capture_output=True, text=True, check=False)
    names = ("--kernel-name", "--kernel-regex", "--filter")
    name = next((name for name in names if name in offered.stdout + offered.stderr), None)
    return [] if name is None else [name, "kns=megatron"]


def verdict(code: int, words: str) -> str:
    """What a checker said, in a few words."""
    lines = [line.removeprefix("=========").strip() for line in words.splitlines()]
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), "")
    if code == 0:
        return "clean"
    if code == FOUND_SOMETHING:
        return f"found: {summary}"
    reason = next((line for line in lines if "not supported" in line.lower()), summary)
    return f"did not run: exit code {code}; {reason or (lines or [''])[-1]}"


def find_checker() -> str | None:
    """compute-sanitizer, on the PATH or in the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", os.environ.get("CUDA_PATH", "/usr/local/cuda"))
    places = (None, f"{home}/bin", f"{home}/compute-sanitizer")
    found = (shutil.which("compute-sanitizer", path=place) for place in places)
    return next((path for path in found if path is not None), None)


def _run(
    command: Sequence[str], context: Context, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and words; the words are also written to this section's log."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=max(context.seconds_left, 1.0),
        )
    except subprocess.TimeoutExpired as error:
        words = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        print(words, flush=True)
        return 124, f"{words}\nno time was left"
    print(done.stdout, flush=True)
    return done.returncode, done.stdout
