"""The examples of fine-tuning: what they make up, what they refuse, and that one learns."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
import torch

import megatron.hf as hf
from examples.finetune import common, question_answering
from examples.finetune.language import VOCABULARY, numbers
from megatron.errors import CheckpointError, ConfigError
from megatron.hf.fine_tuning_losses import LABELS, sequence_shape

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    file.stem
    for file in (ROOT / "examples" / "finetune").glob("*.py")
    if file.stem not in ("common", "language")
)
SAMPLES = 64


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "TRAINED_ON", SAMPLES)
    monkeypatch.setattr(common, "HELD_OUT", SAMPLES)


def started(script: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Run a script in this process."""
    module: ModuleType = importlib.import_module(f"examples.finetune.{script}")
    monkeypatch.setattr(sys, "argv", [script, *flags])
    module.main()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_example_runs(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started(script, monkeypatch, "--steps", "2")
    _, first, second, title, loss, metric, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/2 |") and second.startswith("step 2/2 |")
    assert re.fullmatch(r"64 samples held out +before +after", title)
    assert re.fullmatch(r"loss( +\d+\.\d{4}){2}", loss)
    assert re.fullmatch(r"[a-z ]+( +\d+\.\d{4}){2}", metric)


def test_an_answer_stands_where_the_labels_say() -> None:
    random = Random(1)
    samples = [question_answering.draw(random) for _ in range(SAMPLES)]
    batch = question_answering.collate(samples)
    places = zip(batch["start_positions"].tolist(), batch["end_positions"].tolist(), strict=True)
    for row, (start, end), (*_, answer) in zip(batch["input_ids"], places, samples, strict=True):
        assert row[start : end + 1].tolist() == numbers(answer.split())


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_a_review_is_judged_in_other_ways(
    problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started("sequence_classification", monkeypatch, "--steps", "1", "--problem-type", problem)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("mean error" if problem == "regression" else "all of a text right")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["--steps", "0"], "--steps: expected at least 1, found 0"),
        (["--batch-size", "10"], "--batch-size: 10 is no multiple of --micro-batch-size 32 x 1"),
        (["--pipeline-schedule", "1f2b"], "pipeline_schedule 1f2b is none of"),
        (["--tensor-model-parallel-size", "2"], "needs a multiple of 2 ranks and found 1"),
        (["--lr", "-1"], r"lr -1.0 is outside \[0, inf\)"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        started("token_classification", monkeypatch, *flags)
    assert len(caught.value.problems) == 1


def test_a_model_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--steps", "1", "--model", str(tmp_path)
    with pytest.raises(CheckpointError, match="config.json"):
        started("causal_lm", monkeypatch, *flags)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    small = {"vocab_size": 9, "max_position_embeddings": 9, "num_hidden_layers": 1}
    hf.BertForMaskedLM(hf.BertConfig(**sizes, **small)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        started("causal_lm", monkeypatch, *flags)
    assert [re.findall(r"its (\w+) is 9", line) for line in caught.value.problems] == [
        ["vocab_size"],
        ["max_position_embeddings"],
    ]


def test_one_example_saves_what_another_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started("causal_lm", monkeypatch, "--steps", "1", "--save", str(tmp_path))
    assert hf.MegatronBertForCausalLM.from_pretrained(tmp_path).config.is_decoder
    capsys.readouterr()
    started("masked_lm", monkeypatch, "--steps", "1", "--model", str(tmp_path))
    assert "MegatronBertForMaskedLM" in capsys.readouterr().out


def test_an_example_learns_on_two_tensor_ranks(tmp_path: Path) -> None:
    command = (
        f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 "
        f"examples/finetune/token_classification.py --tensor-model-parallel-size 2 "
        f"--steps 80 --save {tmp_path}"
    )
    result = subprocess.run(
        command.split(),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    accuracy = re.search(r"^accuracy +(\S+) +(\S+)$", result.stdout, re.MULTILINE)
    assert accuracy is not None, result.stdout
    before, after = map(float, accuracy.groups())
    assert before < 0.3
    assert after > 0.9
    model = hf.MegatronBertForTokenClassification.from_pretrained(tmp_path)
    example = importlib.import_module("examples.finetune.token_classification")
    random = Random(99)
    batch = example.collate([example.draw(random) for _ in range(SAMPLES)])
    right, count = example.metrics(model(**batch), batch)["accuracy"]
    assert right / count > 0.9


@pytest.mark.parametrize("script", SCRIPTS)
def test_batches_are_what_the_model_documents(script: str) -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    module = importlib.import_module(f"examples.finetune.{script}")
    draw = getattr(module, "draw", None) or module.draw_pair
    samples = [draw(Random(seed)) for seed in range(8)]
    extra = {"problem": module.SINGLE} if script == "sequence_classification" else {}
    batch = module.collate(samples, **extra)
    assert sequence_shape(batch)[1] == module.LENGTH
    assert batch.keys() & LABELS
    assert int(batch["input_ids"].max()) < len(VOCABULARY)
    assert torch.equal(batch["attention_mask"] == 1, batch["input_ids"] != 0)
