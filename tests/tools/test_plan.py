"""The tool that searches layouts, from the command line to the table."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from megatron.errors import ConfigError
from megatron.planner.models import model_names

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--model-type", "gpt", "--num-layers", "2", "--hidden-size", "2048", "--bf16"),
    *("--num-attention-heads", "16", "--seq-length", "1024", "--max-position-embeddings", "1024"),
    *("--global-batch-size", "16", "--vocab-size", "16000"),
]


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("plan_tool", ROOT / "tools" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "plan.py", *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def test_a_table_with_reasons_and_flags(tmp_path: Path) -> None:
    finished = _run(
        *SMALL, "--gpus", 4, "--best", 2, "--json", tmp_path / "found.json",
        "--micro-batch-size", 2,
        "--tensor-model-parallel-size", 2, "--recompute-granularity", "none",
        "--sequence-parallel", "true", "--shard-gradients", "false",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["best"]) == 2
    for each in found["best"]:
        assert " ".join(each["flags"]) in finished.stdout
        assert each["layout"]["tensor_model_parallel_size"] == 2
        assert each["layout"]["recompute_granularity"] is None
        assert each["plan"]["fits"]
    assert found["best"][0]["reason"].startswith("fastest: ")
    assert "4 x h100-sxm, batch 16" in finished.stdout
    assert f"{found['valid_layouts']} valid layouts" in finished.stdout
    assert "dry runs" in finished.stderr


def test_an_unknown_model_is_named() -> None:
    finished = _run("--model", "gpt-18", "--gpus", 8)
    assert finished.returncode == 2
    assert finished.stderr == "error: --model gpt-18 is not known: did you mean gpt-18b?\n"


def test_a_model_is_its_script_without_the_layout(plan: ModuleType) -> None:
    wanted = plan.read_wanted(["--global-batch-size", "64"], "gpt-18b")
    assert (wanted.base.model.num_layers, wanted.base.model.hidden_size) == (40, 6144)
    assert wanted.base.model.vocab_size == 51200
    assert wanted.base.train.global_batch_size == 64
    assert wanted.base.parallel.tensor_model_parallel_size == 1
    assert wanted.fixed == {}


@pytest.mark.parametrize("name", ["bert-345m", "t5-3b", "llama-70b"])
def test_every_family_is_known(plan: ModuleType, name: str) -> None:
    assert name in model_names()
    wanted = plan.read_wanted([], name)
    assert wanted.base.model.model_type == name.split("-")[0].replace("llama", "gpt")


def test_a_file_states_the_model_and_the_command_line_the_layout(
    plan: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    lines = {"num-layers": 2, "hidden-size": 64, "num-attention-heads": 4, "seq-length": 32,
             "max-position-embeddings": 32, "vocab-size": 100, "global-batch-size": 8, "lr": 1e-4,
             "train-iters": 5, "tensor-model-parallel-size": 2, "sequence-parallel": True,
             "micro-batch-size": 8, "pipeline-layers": [1, 1],
             "pipeline-model-parallel-size": 2}  # fmt: skip
    file.write_text(yaml.safe_dump(lines))
    words = ["--config-file", str(file), "--model-type", "gpt", "--model-parallel-size", "4"]
    wanted = plan.read_wanted(words, None)
    assert wanted.base.model.hidden_size == 64
    assert wanted.base.parallel.pipeline_layers is None
    assert not wanted.base.parallel.sequence_parallel
    assert wanted.fixed == {"tensor_model_parallel_size": 4}


def test_mistakes_are_named(plan: ModuleType) -> None:
    for words, expected in (
        ([*SMALL, "--pipeline-schedule", "2f2b"], "--pipeline-schedule 2f2b is none of"),
        ([*SMALL, "--hiden-size", "3"], "unknown flag --hiden-size: did you mean --hidden-size?"),
        (SMALL[:-2], "--vocab-size is required"),
    ):
        with pytest.raises(ConfigError) as caught:
            plan.read_wanted(words, None)
        assert expected in str(caught.value)
