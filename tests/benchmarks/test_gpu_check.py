"""`make gpu-check`, tried out on a CPU: its sections, its table of kernels, its report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import check, testing
from benchmarks.gpu.check import Check, Running, Section, short_name
from benchmarks.gpu.kernels import CASES
from benchmarks.gpu.models import TRAININGS
from benchmarks.gpu.report import Goal, goals, markdown
from benchmarks.gpu.testing import read_reports, verdict
from benchmarks.gpu.training import one_of_each_kind
from megatron.ops.build import cuda_sources

ROOT = Path(__file__).resolve().parents[2]


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.check", *arguments]
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=ROOT, timeout=170
    )


def _launchers() -> set[str]:
    """What `csrc/cuda/` offers to be launched."""
    found = (
        re.findall(r"^EXPORT int (\w+)\(", p.read_text(), re.MULTILINE) for p in cuda_sources()
    )
    return {name for names in found for name in names}


def test_a_trial_goes_through_every_section(tmp_path: Path) -> None:
    done = _run("--smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu-smoke.json").read_text())
    assert {name: each["state"] for name, each in found["sections"].items()} == dict.fromkeys(
        check.SECTIONS, "done"
    )
    forward = {case.name for case in CASES}
    backward = {f"{case.name}, backward" for case in CASES if case.moved_back is not None}
    assert set(found["kernels"]) == forward | backward
    for case in found["kernels"].values():
        assert case["share_of_copy"] > 0 and case["ratio_to_torch"] > 0
        assert case.get("difference", 0) < 1e-2
    assert set(found["sanitizer"]["launchers"]) == _launchers()
    assert set(found["training"]) == {training.name for training in one_of_each_kind()}
    for training in found["training"].values():
        assert training["absent"] == {}
        titles = set(training["contestants"])
        assert {"transformers", "megatron, kernels emulated", "megatron, kernels torch"} <= titles
        for row in training["contestants"].values():
            assert all(4 < loss < 7 for loss in row["losses"])
    assert all(run["agrees"] for run in found["agreement"].values())
    table = (tmp_path / "gpu-smoke.md").read_text()
    assert table in done.stdout
    for name in (*forward, *found["training"]):
        assert name in table


def test_mistakes_are_one_line() -> None:
    done = _run("--only", "kernels,nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --only nothing: the sections are machine,")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    done = _run("--only", "machine", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: PyTorch finds no GPU here; --smoke tries the check out on a CPU\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_models_have_the_sizes_of_their_names() -> None:
    by_name = {training.name: training for training in TRAININGS}
    for name, billions in (("GPT-1.3B, s = 1024", 1.3), ("GPT-345M, s = 1024", 0.345)):
        training = by_name[name]
        matrices = 12 * training.layers * training.hidden**2
        parameters = matrices + training.vocabulary * training.hidden
        assert parameters / 1e9 == pytest.approx(billions, rel=0.05)
        # 6 operations for each parameter and token, and attention besides.
        assert 1.0 < training.flops() / (6 * parameters * training.tokens) < 1.2
        assert 0 < training.attention_flops_ahead() < 0.1 * training.flops()
    assert {training.tokens for training in TRAININGS} == {16384}


def _running(name: str, command: list[str], seconds: float) -> Running:
    log = check.WORK / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    now = time.monotonic()
    findings = log.with_suffix(".json")
    return Running(Section(name, seconds), process, findings, now, now + seconds)


def test_a_section_that_fails_or_hangs_leaves_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "WORK", tmp_path)
    (tmp_path / "hangs.json").write_text('{"some": 1}')
    hanging = "import subprocess; subprocess.run(['sleep', '600'])"
    one = Check(only=[], smoke=True, out=tmp_path / "out", deadline=0.0)
    one._wait(
        [
            _running("hangs", [sys.executable, "-c", hanging], 0.5),
            _running("fails", [sys.executable, "-c", "raise SystemExit('in these words')"], 60.0),
        ]
    )
    assert one.path is None  # the GPU is not known yet
    one.found["machine"] = {"name": "NVIDIA H100 80GB HBM3", "torch": "2.11", "python": "3.12"}
    one.write()
    found = json.loads((tmp_path / "out" / "gpu-h100-80gb-hbm3.json").read_text())
    assert found["hangs"] == {"some": 1}
    assert found["sections"]["hangs"]["state"] == "cut off"
    assert found["sections"]["fails"]["state"] == "failed"
    assert found["sections"]["fails"]["last_words"] == ["in these words"]


def test_goals_are_counted_as_reached_and_missed() -> None:
    found: dict[str, Any] = {
        "sections": {},
        "kernels": {
            "good": {"share_of_copy": 0.95, "ratio_to_torch": 1.5, "difference": 1e-3},
            "bad": {"share_of_copy": 0.5, "compiled_absent": "no", "difference": float("inf")},
            "gone": {"absent": "RuntimeError: a kernel"},
        },
        "training": {
            "GPT": {
                "best": "megatron",
                "goal": 0.6,
                "contestants": {
                    "megatron": {
                        "share_of_matmul": 0.61,
                        "tokens_per_second": 1.0,
                        "model_tflops": 1.0,
                        "peak_gib": 1.0,
                    }
                },
                "ratios": {"plain": 1.1},
                "absent": {"transformers": "not here"},
                "tokens": 1000,
                "planned": {"for": "h100-sxm", "seconds": 0.5, "peak_gib": 3.25},
            }
        },
    }
    reached = {goal.what: goal.is_reached for goal in goals(found)}
    assert reached == {
        "good: share of a copy": True,
        "good: to torch": True,
        "good: difference": True,
        "bad: share of a copy": False,
        "bad: difference": False,
        "GPT: share of a matrix product": True,
        "GPT: to plain": False,
    }
    table = markdown(found)
    assert "## Goals: 4 of 7 reached" in table
    assert table.count("**missed**") == 3
    assert "RuntimeError: a kernel" in table and "not here" in table
    assert "A dry run for h100-sxm says 2000 tokens/s and 3.2 GiB." in table
    assert not Goal("NaN", float("nan"), 1.0).is_reached


def test_names_of_files() -> None:
    assert short_name("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


def test_what_a_checker_says() -> None:
    assert verdict(0, "========= ERROR SUMMARY: 0 errors") == "clean"
    words = "========= Error: Race\n========= RACECHECK SUMMARY: 1 hazard displayed"
    found = verdict(testing.FOUND_SOMETHING, words)
    assert found == "found: RACECHECK SUMMARY: 1 hazard displayed"
    assert verdict(1, "========= Device not supported").startswith("did not run")


def test_pytests_report_is_read(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure/></testcase>'
        '<testcase classname="b" name="three"><skipped/></testcase></testsuite></testsuites>'
    )
    assert read_reports([path]) == {"passed": 1, "skipped": 1, "failed": 1, "failures": ["a::two"]}
