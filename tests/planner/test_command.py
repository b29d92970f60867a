"""--dry-run as a user meets it: what is printed, written and refused, and how the program ends."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pretrain_bert
import pretrain_gpt
import pretrain_t5
from megatron.planner import command as command_module
from tests.training.command import Command
from tests.training.corpus import write_corpus

ROOT = Path(__file__).parents[2]
TINY = [
    *("--dry-run", "--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4"),
    *("--seq-length", "32", "--max-position-embeddings", "32", "--vocab-size", "1000"),
    *("--micro-batch-size", "2", "--global-batch-size", "16", "--train-iters", "100"),
    *("--lr", "1e-4"),
]
TRAIN_ITERS = ("--train-iters", "100")
A_PLAN = "GPT, 266.1 K parameters"


@pytest.fixture
def gpt(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(pretrain_gpt, capfd, monkeypatch)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which a plan is begun."""

    def begun(*_: object) -> None:
        raise AssertionError("a plan was begun")

    monkeypatch.setattr(command_module, "record", begun)


def errors(said: Command) -> list[str]:
    """The problems that a program has told."""
    lines = said.err.splitlines()
    assert all(line.startswith(("error: ", "warning: ")) for line in lines), said.err
    return [line.removeprefix("error: ") for line in lines]


def numbers(found: object) -> Iterator[float]:
    """All numbers of a JSON."""
    if isinstance(found, dict | list):
        for each in found.values() if isinstance(found, dict) else found:
            yield from numbers(each)
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield found


def hold_together(plan: dict[str, Any]) -> None:
    """Asserts what must be true of the figures of any plan."""
    assert all(map(math.isfinite, numbers(plan)))
    model, cluster, layout, step = (plan[k] for k in ("model", "cluster", "layout", "step"))
    batch = layout["micro_batch_size"] * layout["micro_batches"] * layout["data"]
    length = model["sequence_length"] + (model["decoder_sequence_length"] or 0)
    usable = cluster["memory_bytes"] - cluster["reserved_bytes"]
    assert cluster["gpus"] == layout["tensor"] * layout["pipeline"] * layout["data"]
    assert layout["global_batch_size"] == batch == plan["config"]["train"]["global_batch_size"]
    assert step["tokens"] == batch * length
    assert step["tokens_per_second"] * step["seconds"] == pytest.approx(step["tokens"])
    assert 0 < step["pipeline_seconds"] <= step["seconds"]
    assert 0 <= step["bubble"] < 1
    assert step["executed_flops"] >= step["model_flops"]
    for kind in ("model", "executed"):
        rate = step[f"{kind}_tflops_per_second_per_gpu"] * 1e12 * cluster["gpus"]
        assert rate * step["seconds"] == pytest.approx(step[f"{kind}_flops"])
    peak = cluster["peak_tflops_per_second"]
    assert step["mfu"] * peak == pytest.approx(step["model_tflops_per_second_per_gpu"])
    assert len(plan["ranks"]) == layout["pipeline"]
    assert sum(rank["parameters"] for rank in plan["ranks"]) == model["parameters"]
    for rank in plan["ranks"]:
        parts = ("weights", "gradients", "optimizer", "activations")
        assert rank["peak_bytes"] == sum(rank[f"{part}_bytes"] for part in parts)
        assert rank["fits"] == (rank["peak_bytes"] <= usable)
    communications = [each for rank in plan["ranks"] for each in rank["communications"]]
    sent, received = (
        sum(each["bytes"] for each in communications if each["kind"] == kind)
        for kind in ("send", "recv")
    )
    assert sent == received
    assert plan["fits"] == all(rank["fits"] for rank in plan["ranks"])
    assert plan["run"]["seconds"] == pytest.approx(plan["run"]["steps"] * step["seconds"])
    assert plan["run"]["days"] * 86400 == pytest.approx(plan["run"]["seconds"])


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        (pretrain_gpt, "--world-size 1 --fp64"),
        (
            pretrain_gpt,
            "--world-size 5000 --global-batch-size 20000 --fp16 --hardware v100-32gb "
            "--rampup-batch-size 10000 10000 100000 --train-samples 1000000",
        ),
        (pretrain_gpt, "--world-size 4 --bf16 --use-distributed-optimizer --shard-gradients"),
        (
            pretrain_gpt,
            "--world-size 16 --num-layers 17 --pipeline-model-parallel-size 16 "
            f"--pipeline-layers 2{',1' * 15} --recompute-granularity full",
        ),
        (
            pretrain_gpt,
            "--world-size 8 --tensor-model-parallel-size 2 --sequence-parallel "
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        ),
        (
            pretrain_bert,
            "--world-size 4 --pipeline-model-parallel-size 4 --pipeline-schedule zb-2p",
        ),
        (
            pretrain_t5,
            "--world-size 3 --pipeline-model-parallel-size 3 --decoder-seq-length 16 "
            "--pipeline-model-parallel-split-rank 1 --decoder-num-layers 2",
        ),
    ],
)
def test_the_figures_of_a_plan_hold_together(
    program: Any,
    flags: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Command(program, capfd, monkeypatch)
    words = [word for word in TINY if not ("--train-samples" in flags and word in TRAIN_ITERS)]
    assert run([*words, *flags.split(), "--dry-run-json", str(tmp_path / "plan.json")]) == 0
    assert run.err == ""
    plan = json.loads((tmp_path / "plan.json").read_text())
    hold_together(plan)
    assert max(map(len, run.out.splitlines())) <= 100
    if "--train-samples" in flags:
        assert plan["run"]["steps"] == 50
        assert "for 50 full steps; " in run.out


def test_text_and_json_say_the_same_and_again(gpt: Command, tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.json"
    flags = "--bf16 --world-size 4 --pipeline-model-parallel-size 2 --dry-run-json"
    assert gpt([*TINY, *flags.split(), str(path)]) == 0
    first, text = path.read_bytes(), gpt.out
    assert gpt([*TINY, *flags.split(), str(path)]) == 0
    assert (path.read_bytes(), gpt.out) == (first, text)
    plan = json.loads(first)
    step, run = plan["step"], plan["run"]
    lines = {line[:10].strip(): line[10:] for line in text.split("A step\n")[1].splitlines()[:7]}
    milliseconds, tokens = re.findall(r"[\d,.]+", lines["time"])[:2]
    assert float(milliseconds) == pytest.approx(1000 * step["seconds"], abs=0.006)
    assert tokens == f"{step['tokens_per_second']:,.0f}"
    assert f"{100 * step['bubble']:.1f}  %" in lines["bubble"]
    rate = f"{step['model_tflops_per_second_per_gpu']:.1f}  TFLOP/s per GPU"
    assert f"{rate}  MFU {100 * step['mfu']:.1f} % of 989 in bfloat16\n" in text
    assert f"{run['seconds']:.1f}  seconds" in lines["whole run"]
    fullest = max(rank["peak_bytes"] for rank in plan["ranks"]) / 2**20
    assert f"needs {fullest:,.2f} of" in text


def test_what_is_wrong_beside_the_plan_follows_it(gpt: Command, tmp_path: Path) -> None:
    files = ["--vocab-file", str(tmp_path / "vocab"), "--merge-file", str(tmp_path / "merges")]
    data = ["--data-path", str(tmp_path / "data"), "--save", str(tmp_path / "new")]
    assert gpt([*TINY, *files, *data]) == 2
    assert A_PLAN in gpt.out
    assert errors(gpt) == [
        f"--data-path {tmp_path}/data: {tmp_path}/data.idx does not exist",
        f"--data-path {tmp_path}/data: {tmp_path}/data.bin does not exist",
        f"--vocab-file {tmp_path}/vocab does not exist",
        f"--merge-file {tmp_path}/merges does not exist",
    ]
    assert not list(tmp_path.iterdir())


def test_all_that_is_wrong_is_told_where_no_plan_can_be_made(
    gpt: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout, the number of ranks, the data and the disk."""
    corpus = write_corpus(tmp_path, largest_token=500)
    free = SimpleNamespace(total=10**6, used=9 * 10**5, free=10**4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    flags = corpus.flags(
        dry_run=True, tokenizer_type="BertWordPieceLowerCase", tensor_model_parallel_size=3,
        world_size=4, use_cpu=None, save=tmp_path / "new", load=tmp_path / "nowhere",
    )  # fmt: skip
    assert gpt(flags) == 2
    assert gpt.out == ""
    ranks, heads, width, load, token, disk = errors(gpt)
    assert ranks.startswith("the number of ranks, 4, is not a multiple of --tensor-model-parallel")
    assert heads == "--num-attention-heads 4 is not divisible by --tensor-model-parallel-size 3"
    assert width.endswith("64 is not divisible by --tensor-model-parallel-size 3")
    assert load == f"--load {tmp_path}/nowhere does not exist"
    assert "is 500, outside the vocabulary of 64 tokens" in token
    # Weights and two moments in float32, of which two checkpoints do not fit.
    assert disk.startswith(f"--save {tmp_path}/new: 9.766 KiB are free, expected ")


@pytest.mark.usefixtures("no_work")
def test_a_model_that_is_impossible_keeps_nothing_else_back(gpt: Command, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, largest_token=500)
    flags = {"dry_run": True, "tokenizer_type": "BertWordPieceLowerCase", "hidden_size": 18}
    ramp = ["--rampup-batch-size", "100", "10", "50"]
    places = ["--save", str(tmp_path / "new"), "--load", str(tmp_path)]
    assert gpt([*corpus.flags(**flags), *ramp, *places]) == 2
    assert [line.partition(" ")[0] for line in errors(gpt)] == [
        "--hidden-size",
        "--rampup-batch-size:",
        "--rampup-batch-size",
        f"{corpus.prefix}.bin:",
    ]


def test_without_a_tokenizer_the_vocabulary_has_to_be_stated(gpt: Command) -> None:
    words = [word for word in TINY if word not in ("--vocab-size", "1000")]
    assert gpt(words) == 2
    assert errors(gpt) == ["--dry-run without a tokenizer's files needs --vocab-size"]


def test_what_one_should_know_of_the_figures_is_no_error(gpt: Command, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    known = (ROOT / "megatron/planner/hardware/a100-80gb.yaml").read_text()
    small.write_text(known.replace("gpus_per_node: 8", "gpus_per_node: 2"))
    flags = "--use-cpu --world-size 4 --tensor-model-parallel-size 4 --hardware"
    assert gpt([*TINY, *flags.split(), str(small)]) == 0
    assert "4 x CPU as if it were a100-80gb, 2 nodes: tensor 4" in gpt.out
    assert "GPU" not in gpt.out.split("What this rests on")[0].replace("GPUs", "")
    on_cpu, over_nodes = errors(gpt)
    assert on_cpu.startswith("warning: --use-cpu: bytes and communication are those of CPUs")
    assert "those of --hardware a100-80gb" in on_cpu
    assert over_nodes.startswith("warning: --tensor-model-parallel-size 4 and 2 GPUs in a node")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("flags", "problems"),
    [
        ("--hardware h100", ["--hardware h100 is none of a100-80gb, h100-sxm, v100-32gb"]),
        ("--hardware v100-32gb --bf16 --fp8-format e4m3",
         ["--hardware v100-32gb has no rate for bfloat16, only for float16, float32",
          "--hardware v100-32gb has no rate for float8, only for float16, float32"]),
        ("--hardware a100-80gb --bf16 --fp8-format hybrid",
         ["--hardware a100-80gb has no rate for float8, only for bfloat16"]),
        ("--dry-run-json HERE", ["--dry-run-json HERE is a directory, expected a file"]),
        ("--dry-run-json HERE/file/plan.json",
         ["--dry-run-json HERE/file/plan.json: HERE/file is no directory"]),
        ("--hardware HERE/file --dry-run-picture HERE/file/plan.docx --dry-run-json HERE",
         ["--hardware HERE/file: the file: expected keys with values, found 'words'",
          "--dry-run-json HERE is a directory, expected a file",
          "--dry-run-picture HERE/file/plan.docx: expected a picture such as .png, .svg or .pdf",
          "--dry-run-picture HERE/file/plan.docx: HERE/file is no directory"]),
    ],
)  # fmt: skip
def test_mistakes_of_the_dry_run_itself_are_told_before_the_work(
    gpt: Command, tmp_path: Path, flags: str, problems: list[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("words")
    assert gpt([*TINY, *flags.replace("HERE", str(tmp_path)).split()]) == 2
    assert gpt.out == ""
    found = [line.replace(str(tmp_path), "HERE") for line in errors(gpt)]
    assert [line[: len(start)] for line, start in zip(found, problems, strict=True)] == problems


@pytest.mark.usefixtures("no_work")
def test_a_missing_package_is_told_before_the_work(
    gpt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert gpt([*TINY, "--dry-run-picture", "plan.png"]) == 2
    (problem,) = errors(gpt)
    assert problem.startswith("--dry-run-picture plan.png: drawing needs the package matplotlib")


def test_of_several_ranks_one_plans(
    gpt: Command, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert (gpt(TINY), gpt.out, gpt.err) == (0, "", "")
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert gpt(TINY) == 0
    assert "\n2 x h100-sxm, 1 node: tensor 1 x pipeline 1 x data 2\n" in gpt.out


def test_an_interrupt_ends_it_at_once(gpt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_module, "record", interrupted)
    assert (gpt(TINY), gpt.out, gpt.err) == (130, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_file_that_cannot_be_written_leaves_the_text(gpt: Command) -> None:
    assert gpt([*TINY, "--dry-run-json", "/dev/full"]) == 2
    assert A_PLAN in gpt.out
    assert errors(gpt) == ["--dry-run-json /dev/full: No space left on device"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_sees_that_something_happens(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    with command_module._shown("planning ..."):
        during = stderr.getvalue()
    assert during == ("planning ..." if is_terminal else "")
    shown = stderr.getvalue().removeprefix(during)
    assert shown == ("\r" + 12 * " " + "\r" if is_terminal else "")


def test_a_reader_may_stop_reading(tmp_path: Path) -> None:
    """Of a process of its own: nothing is lost but the text, and nothing else is written."""
    run = subprocess.Popen(
        [sys.executable, ROOT / "pretrain_gpt.py", *TINY, "--dry-run-json", "plan.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.close()
    with run.stderr:
        said = run.stderr.read().decode()
    assert (run.wait(), said) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    hold_together(json.loads((tmp_path / "plan.json").read_text()))
