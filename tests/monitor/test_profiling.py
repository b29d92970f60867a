"""A profile holds what ran in its iterations, under the names of the ranges, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron.monitor import StepProfiler, annotated

CPU = torch.device("cpu")


def names_in(trace: Path) -> list[str]:
    events = json.loads(trace.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("ph") == "X"]


def run(profiler: StepProfiler, iterations: range) -> list[int]:
    """Runs iterations of one range and one product each; those after which one was written."""
    written = []
    for iteration in iterations:
        profiler.begin(iteration)
        with annotated("layer", iteration):
            torch.randn(4, 4) @ torch.randn(4, 4)
        if profiler.end(iteration):
            written.append(iteration)
    return written


def test_only_the_named_iterations_are_in_it(tmp_path: Path) -> None:
    profiler = StepProfiler(range(2, 4), tmp_path, 3, CPU)
    assert run(profiler, range(1, 7)) == [3]
    names = names_in(tmp_path / "rank3.json")
    assert [name for name in names if name.startswith("layer")] == ["layer 2", "layer 3"]
    assert names.count("aten::mm") == 2
    assert "aten::mm" in (tmp_path / "rank3.txt").read_text()


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path: Path) -> None:
    profiler = StepProfiler(range(2, 9), tmp_path, 0, CPU)
    assert run(profiler, range(1, 5)) == []
    profiler.close()
    names = names_in(tmp_path / "rank0.json")
    assert [name for name in names if name.startswith("layer")] == ["layer 2", "layer 3", "layer 4"]


def test_a_run_that_begins_later_profiles_the_rest(tmp_path: Path) -> None:
    profiler = StepProfiler(range(2, 6), tmp_path, 0, CPU)
    assert run(profiler, range(5, 8)) == [5]
    assert names_in(tmp_path / "rank0.json").count("layer 5") == 1


def test_without_steps_nothing_is_written(tmp_path: Path) -> None:
    assert run(StepProfiler(range(0), tmp_path / "none", 0, CPU), range(1, 5)) == []
    assert not (tmp_path / "none").exists()
