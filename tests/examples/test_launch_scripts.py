"""The launch scripts: what they say of themselves is so, and what users set reaches the program."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.monitor import read_metrics
from tests.examples.published import (
    EXAMPLES,
    ROOT,
    SCRIPTS,
    TASKS,
    dry_flags,
    header,
    in_words,
    kind_of,
    layout,
    parameters,
    planned,
    run,
    table,
)
from tests.training.command import Command
from tests.training.corpus import write_corpus

# In millions, as the papers print it, and the unit of the last digit printed.
PUBLISHED = {
    "bert/110m": (110, 10),  # 1810.04805
    "bert/345m": (336, 1),  # 1909.08053
    "bert/1.3b": (1300, 100),
    "bert/3.9b": (3900, 100),
    "gpt/345m": (355, 1),
    "gpt/1.2b": (1200, 100),
    "gpt/2.5b": (2500, 100),
    "gpt/4.2b": (4200, 100),
    "gpt/8.3b": (8300, 100),
    "gpt/125m": (125, 1),  # 2005.14165
    "gpt/1.3b": (1300, 100),
    "gpt/1.7b": (1700, 100),  # 2104.04473
    "gpt/3.6b": (3600, 100),
    "gpt/7.5b": (7500, 100),
    "gpt/18b": (18400, 100),
    "gpt/39b": (39100, 100),
    "gpt/76b": (76100, 100),
    "gpt/145b": (145600, 100),
    "gpt/310b": (310100, 100),
    "gpt/530b": (529600, 100),
    "gpt/1t": (1008000, 1000),
    "gpt/175b": (175000, 1000),  # 2205.05198
    "gpt/llama-8b": (8000, 1000),  # 2407.21783
    "gpt/llama-70b": (70000, 1000),
    "t5/220m": (220, 10),  # 1910.10683
    "t5/3b": (2800, 100),
    "t5/11b": (11000, 1000),
}
# Of the weights that the authors released.
RELEASED = {
    "t5/220m": 222_903_552,
    "t5/3b": 2_851_598_336,
    "t5/11b": 11_307_321_344,
    "gpt/llama-8b": 8_030_261_248,
    "gpt/llama-70b": 70_553_706_496,
}
# Heads, hidden, layers, tensor, pipeline, GPUs and batch: arXiv 2104.04473, table 1, and for 175b
# arXiv 2205.05198, table 3.
WEAK_SCALING = {
    "gpt/1.7b": (24, 2304, 24, 1, 1, 32, 512),
    "gpt/3.6b": (32, 3072, 30, 2, 1, 64, 512),
    "gpt/7.5b": (32, 4096, 36, 4, 1, 128, 512),
    "gpt/18b": (48, 6144, 40, 8, 1, 256, 1024),
    "gpt/39b": (64, 8192, 48, 8, 2, 512, 1536),
    "gpt/76b": (80, 10240, 60, 8, 4, 1024, 1792),
    "gpt/145b": (96, 12288, 80, 8, 8, 1536, 2304),
    "gpt/175b": (96, 12288, 96, 8, 8, 64, 64),
    "gpt/310b": (128, 16384, 96, 8, 16, 1920, 2160),
    "gpt/530b": (128, 20480, 105, 8, 35, 2520, 2520),
    "gpt/1t": (160, 25600, 128, 8, 64, 3072, 3072),
}
GPT3_TOKENS, SEQUENCE = 300e9, 2048

ALL = [pytest.param(script, id=script) for script in SCRIPTS]


def test_every_size_has_a_script() -> None:
    assert set(SCRIPTS) == PUBLISHED.keys()


@pytest.mark.parametrize("script", ALL)
def test_what_a_script_says_of_itself_is_so(script: str) -> None:
    said = header(script)
    file = EXAMPLES / f"{script}.sh"
    assert os.access(file, os.X_OK)
    assert said["parameters"].startswith(f"{in_words(parameters(script))}; published: ")
    assert said["layout"] == layout(script)
    assert said["source"].startswith("arXiv ") and said["ours"]
    lines = file.read_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("#     DATA=") and f"{script}.sh" in line for line in lines)


@pytest.mark.parametrize("script", ALL)
def test_parameters_are_those_published(script: str) -> None:
    stated, unit = (million * 1e6 for million in PUBLISHED[script])
    difference = abs(parameters(script) - stated)
    is_close = difference <= 0.01 * stated
    assert is_close or difference < unit
    published = header(script)["parameters"].split("; published: ")[1]
    number, scale = re.findall(r"([\d.]+) (million|billion)", published)[0]
    assert float(number) * {"million": 1e6, "billion": 1e9}[scale] == pytest.approx(stated)
    assert is_close or re.search("rounded|about|around", published)


@pytest.mark.parametrize("script", RELEASED)
def test_parameters_are_those_released(script: str) -> None:
    assert parameters(script) == RELEASED[script]


@pytest.mark.parametrize("script", WEAK_SCALING)
def test_the_weak_scaling_study_is_as_published(script: str) -> None:
    config, world_size = planned(script)
    model, parallel = config.model, config.parallel
    a, h, l, t, p, gpus, batch = WEAK_SCALING[script]  # noqa: E741
    assert (model.num_attention_heads, model.hidden_size, model.num_layers) == (a, h, l)
    assert parallel.tensor_model_parallel_size == t
    assert parallel.pipeline_model_parallel_size == p
    assert (world_size, config.train.global_batch_size) == (gpus, batch)
    assert (model.vocab_size, config.data.seq_length) == (51200, 2048)
    assert parallel.recompute_granularity == "full"
    assert (parallel.schedule == "interleaved") == (p > 1)
    # Equation 2 of the paper, and the norm behind the last layer, which it leaves out.
    assert parameters(script) == 12 * l * h**2 + 13 * l * h + (51200 + 2048) * h + 2 * h


@pytest.mark.parametrize("script", ["gpt/125m", "gpt/1.3b", *WEAK_SCALING])
def test_the_steps_of_gpt_3_are_300_billion_tokens(script: str) -> None:
    train, optimizer = planned(script)[0].train, planned(script)[0].optimizer
    assert train.global_batch_size is not None and train.train_iters is not None
    assert optimizer.lr_decay_iters is not None
    step = train.global_batch_size * SEQUENCE
    assert 0 <= GPT3_TOKENS - train.train_iters * step < step
    assert 0 <= 260e9 - optimizer.lr_decay_iters * step < step
    assert optimizer.min_lr == pytest.approx(0.1 * optimizer.lr)


def test_readme_holds_the_table() -> None:
    assert table() in (EXAMPLES / "README.md").read_text(encoding="utf-8"), (
        "python -m tests.examples.published prints the table"
    )


# What users set.


@pytest.fixture
def arguments(tmp_path: Path) -> str:
    """A program that prints its arguments, one to a line."""
    program = tmp_path / "arguments"
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    program.chmod(0o755)
    return str(program)


def after(words: list[str], option: str) -> str:
    """The word behind the last mention of an option."""
    return words[len(words) - words[::-1].index(option)]


def test_one_node(arguments: str) -> None:
    files = {"DATA": "0.7 books 0.3 wiki", "VOCAB": "my vocab.json", "MERGES": "merges.txt"}
    done = run("gpt/345m", "--train-iters", "5", PYTHON=arguments, **files)
    words = done.stdout.splitlines()
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "8", "--standalone"]
    assert words[:6] == [*start, f"{ROOT}/pretrain_gpt.py"]
    data = ["--data-path", "0.7", "books", "0.3", "wiki", "--vocab-file", "my vocab.json"]
    assert words[6:15] == [*data, "--merge-file", "merges.txt"]
    assert after(words, "--save") == after(words, "--load") == "runs/gpt-345m/checkpoints"
    assert after(words, "--metrics-file") == "runs/gpt-345m/metrics.jsonl"
    assert words[-2:] == ["--train-iters", "5"]
    assert "--vocab-size" not in words


def test_several_nodes(arguments: str) -> None:
    nodes = {"NODES": "16", "GPUS_PER_NODE": "4", "NODE_RANK": "3", "MASTER_ADDR": "n0"}
    more = {"MASTER_PORT": "2222", "RDZV_ID": "job7", "MAX_RESTARTS": "2", "RUN": "/runs/a b"}
    done = run("bert/345m", PYTHON=arguments, DATA="text", VOCAB="v", **nodes, **more)
    words = done.stdout.splitlines()
    launcher = words[: words.index(f"{ROOT}/pretrain_bert.py")]
    expected = {
        "--nnodes": "16",
        "--nproc-per-node": "4",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "n0:2222",
        "--rdzv-id": "job7",
        "--rdzv-conf": "is_host=false",
        "--max-restarts": "2",
    }
    assert {option: after(launcher, option) for option in expected} == expected
    assert "--standalone" not in launcher
    assert after(words, "--save") == "/runs/a b/checkpoints"
    first = run("bert/345m", PYTHON=arguments, DATA="t", **(nodes | {"NODE_RANK": "0"}))
    assert "is_host=true" in first.stdout and "n0:29500" in first.stdout
    del nodes["NODE_RANK"]
    assert "is_host" not in run("bert/345m", PYTHON=arguments, DATA="t", **nodes).stdout


def test_tokenizers(arguments: str) -> None:
    given = {"PYTHON": arguments, "DATA": "text"}
    words = run("t5/3b", **given, TOKENIZER_MODEL="a b.model").stdout.splitlines()
    assert after(words, "--tokenizer-type") == "SentencePieceTokenizer"
    assert after(words, "--tokenizer-model") == "a b.model"
    flags = "--tokenizer-type BertWordPieceCase --vocab-file v.txt"
    words = run("t5/3b", **given, TOKENIZER=flags).stdout.splitlines()
    assert after(words, "--tokenizer-type") == "BertWordPieceCase"


def test_a_script_runs_from_anywhere(arguments: str, tmp_path: Path) -> None:
    done = run("gpt/125m", cwd=str(tmp_path), PYTHON=arguments, DATA="text")
    assert f"{ROOT}/pretrain_gpt.py" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, "3072"),
        ({"NODES": "4"}, "32"),
        ({"GPUS_PER_NODE": "4"}, "4"),
        ({"NODES": "2", "GPUS_PER_NODE": "3"}, "6"),
    ],
)
def test_a_dry_run_plans_for_the_nodes_that_are_given(
    variables: dict[str, str], ranks: str
) -> None:
    words = run("gpt/1t", PYTHON="echo", DRY_RUN="1", **variables).stdout.split()
    assert words[:4] == [f"{ROOT}/pretrain_gpt.py", "--dry-run", "--world-size", ranks]
    assert after(words, "--vocab-size") == "51200"
    assert "--data-path" not in words and "--save" not in words


def test_a_dry_run_with_data_has_all_flags_of_the_run() -> None:
    given = {"PYTHON": "echo", "DATA": "text", "VOCAB": "v", "MERGES": "m"}
    real = run("gpt/125m", **given).stdout.split()
    dry = run("gpt/125m", **given, DRY_RUN="1", HARDWARE="a100-80gb").stdout.split()
    assert dry[1:6] == ["--dry-run", "--world-size", "32", "--hardware", "a100-80gb"]
    assert dry[6:] == real[real.index(f"{ROOT}/pretrain_gpt.py") + 1 :]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "DATA is not set: the dataset's path without .idx and .bin, or a blend of"),
        ({"DATA": "text", "NODES": "2"}, "NODES=2 needs MASTER_ADDR, the name of the first node"),
        ({"DATA": "text", "NODES": "two"}, "NODES=two: expected a number from 1 on"),
        ({"DATA": "text", "GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0: expected a number from 1 on"),
        (
            {"DATA": "text", "GPUS_PER_NODE": "12"},
            "NODES=1 x GPUS_PER_NODE=12 is not a multiple of --tensor-model-parallel-size 8 x "
            "--pipeline-model-parallel-size 2\n",
        ),
        ({"DRY_RUN": "1", "NODES": "-1"}, "NODES=-1: expected a number from 1 on"),
    ],
)
def test_mistakes(variables: dict[str, str], message: str) -> None:
    done = run("gpt/39b", PYTHON="echo", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_a_layout_behind_the_name_is_the_one_that_has_to_fit() -> None:
    flags = ("--pipeline-model-parallel-size", "1")
    assert run("gpt/39b", *flags, PYTHON="echo", DATA="text").returncode == 0


@pytest.mark.parametrize("size", ["two", "0", "08"])
def test_a_layout_is_made_of_numbers(size: str) -> None:
    flag = "--tensor-model-parallel-size"
    done = run("gpt/39b", flag, size, PYTHON="echo", DATA="text")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {flag} {size}: expected a number from 1 on\n"


def test_data_may_be_a_flag() -> None:
    done = run("bert/345m", "--data-path", "text", "--vocab-file", "v", PYTHON="echo")
    assert done.returncode == 0


def test_the_small_llama_is_launched_likewise(arguments: str) -> None:
    assert "--nproc-per-node\n1\n" in run("pretrain_gpt_llama", PYTHON=arguments).stdout
    two = {"GPUS_PER_NODE": "2", "TENSOR_SIZE": "2"}
    words = run("pretrain_gpt_llama", PYTHON=arguments, **two).stdout.splitlines()
    assert after(words, "--data-path") == f"{ROOT}/quickstart/bert_text_sentence"
    assert after(words, "--tensor-model-parallel-size") == "2" and "--sequence-parallel" in words
    assert after(words, "--nproc-per-node") == "2"
    assert after(words, "--save-interval") == "500"


def test_a_script_trains_under_torchrun(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    flags = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 16 "
        "--max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 8 "
        "--train-iters 2 --log-interval 1 --eval-iters 0 --num-workers 0 --use-cpu"
    )
    done = run(
        "gpt/125m",
        *flags.split(),
        cwd=str(tmp_path),
        PYTHON=sys.executable,
        OMP_NUM_THREADS="1",
        GPUS_PER_NODE="1",
        DATA=str(corpus.prefix),
        VOCAB=str(corpus.vocab_file),
        TOKENIZER="--tokenizer-type BertWordPieceLowerCase",
        RUN="run",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["iteration"] for r in records if "loss" in r] == [1, 2]
    saved = tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert saved.read_text().strip() == "2"


def test_a_dry_run_through_the_shell(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    flags = ("--dry-run-json", str(plan))
    given = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HARDWARE": "a100-80gb"}
    done = run("gpt/125m", *flags, **given, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(plan.read_text())
    assert found["model"]["parameters"] == parameters("gpt/125m")
    assert found["cluster"]["gpus"] == 32 and found["cluster"]["hardware"] == "a100-80gb"


def pipeline_ranks(script: str) -> int:
    """Of the thinned script: as few as share its number of GPUs; all of the longest pipeline."""
    ranks = planned(script)[0].parallel.pipeline_model_parallel_size
    if ranks == 1 or script == "gpt/1t":
        return ranks
    return next(few for few in range(2, ranks + 1) if ranks % few == 0)


def thin(script: str) -> list[str]:
    """Flags that leave a script one layer to a stage and the micro-batches that fill its pipeline.

    `python -m tests.examples.full` plans the scripts whole, which takes minutes.
    """
    config, world_size = planned(script)
    parallel, ranks = config.parallel, pipeline_ranks(script)
    stages = len(TASKS[kind_of(script)](config).stages(config))
    stages = stages // parallel.pipeline_model_parallel_size * ranks
    batch = config.train.micro_batch_size * world_size // parallel.tensor_model_parallel_size
    flags = ["--num-layers", str(stages), "--global-batch-size", str(batch)]
    flags += ["--pipeline-model-parallel-size", str(ranks)]
    if stages > ranks:
        flags += ["--num-layers-per-virtual-pipeline-stage", "1"]
    return flags + (["--decoder-num-layers", "1"] if kind_of(script) == "t5" else [])


@pytest.mark.parametrize("script", ALL)
def test_every_script_runs_dry(
    script: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = Command(importlib.import_module(f"pretrain_{kind_of(script)}"), capfd, monkeypatch)
    plan = tmp_path / "plan.json"
    code = command([*dry_flags(script), *thin(script), "--dry-run-json", str(plan)])
    assert code == 0, command.err
    found = json.loads(plan.read_text())
    assert found["cluster"]["gpus"] == planned(script)[1] and found["fits"]
    assert len(found["ranks"]) == pipeline_ranks(script)
    assert found["step"]["seconds"] > 0


def test_the_shell_reads_every_script() -> None:
    files = [*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("*/*.sh")]
    assert len(files) > len(SCRIPTS)
    for file in files:
        subprocess.run(["bash", "-n", str(file)], check=True)
