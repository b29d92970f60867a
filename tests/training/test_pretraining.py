"""The three pretraining programs on real files: they learn, report, and go on where they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pretrain_bert
import pretrain_gpt
import pretrain_t5
from megatron.checkpoint.reader import Checkpoint
from megatron.config import Config
from megatron.monitor import read_metrics
from megatron.training import (
    BertPretraining,
    GPTPretraining,
    SampleCounts,
    T5Pretraining,
    Task,
    open_for_evaluation,
)
from megatron.training.batches import evaluation_batches
from tests.training.command import Command
from tests.training.corpus import Corpus


@dataclass(frozen=True)
class Kind:
    """A program and the flags by which it trains on the corpus of these tests."""

    program: ModuleType
    task: Callable[[Config], Task]
    flags: Mapping[str, object]


KINDS = {
    "bert": Kind(pretrain_bert, BertPretraining, {}),
    "gpt": Kind(
        pretrain_gpt,
        GPTPretraining,
        {
            "tokenizer_type": "BertWordPieceLowerCase",
            "reset_position_ids": True,
            "reset_attention_mask": True,
            "eod_mask_loss": True,
        },
    ),
    "llama": Kind(
        pretrain_gpt,
        GPTPretraining,
        {
            "tokenizer_type": "BertWordPieceLowerCase",
            "position_embedding_type": "rope",
            "normalization": "RMSNorm",
            "swiglu": True,
            "num_query_groups": 2,
            "disable_bias_linear": True,
            "untie_embeddings_and_output_weights": True,
        },
    ),
    "t5": Kind(pretrain_t5, T5Pretraining, {"vocab_extra_ids": 10, "decoder_seq_length": 8}),
}
RAMP = {
    "train_iters": None,
    "train_samples": 40,
    "global_batch_size": 8,
    "rampup_batch_size": [2, 2, 15],
}
RAMPED_SIZES = [2, 2, 2, 4, 6, 8, 8, 8]  # the ramp's parts begin at 0, 5 and 10


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def command(
    kind: Kind, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    return Command(kind.program, capfd, monkeypatch)


def _column(path: Path, name: str) -> list[float]:
    return [record[name] for record in read_metrics(path) if name in record]


def _assert_same_checkpoint(found: Path, expected: Path) -> None:
    """Bitwise, the state of the optimizer included."""
    one, other = Checkpoint.open(found), Checkpoint.open(expected)
    assert one.run_state == other.run_state
    assert one.stored.shapes == other.stored.shapes
    for key in one.stored.shapes:
        pair = one.stored.read(key), other.stored.read(key)
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True, msg=key)


def test_a_run_learns_and_reports_the_perplexity_of_what_it_has_not_seen(
    kind: Kind, command: Command, corpus: Corpus, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert command(corpus.flags(metrics_file=metrics, **kind.flags)) == 0, command.err
    first = _column(metrics, "lm_loss")[0]
    tokens = 64 + int(str(kind.flags.get("vocab_extra_ids", 0)))
    assert first == pytest.approx(math.log(tokens), rel=0.05)
    held_out = _column(metrics, "validation_lm_loss")
    assert len(held_out) == 2 and held_out[1] < held_out[0] < 0.98 * first
    perplexities = [math.exp(loss) for loss in held_out]
    assert _column(metrics, "validation_perplexity") == pytest.approx(perplexities)
    assert f"validation perplexity {perplexities[1]:.4f}" in command.out


def test_what_was_saved_evaluates_to_what_was_reported(
    kind: Kind, command: Command, corpus: Corpus, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    flags = {**kind.flags, **RAMP, "save": tmp_path / "run", "metrics_file": metrics}
    assert command(corpus.flags(**flags)) == 0, command.err
    trainer = open_for_evaluation(tmp_path / "run", kind.task)
    counts = SampleCounts(train=0, validation=0, test=16)  # two evaluation steps of eight samples
    dataset = trainer.task.datasets(trainer.config, counts, print).test
    assert dataset is not None
    found = trainer.evaluate(evaluation_batches(trainer, dataset))
    assert found["lm_loss"] == pytest.approx(_column(metrics, "test_lm_loss")[0], rel=1e-5)


@pytest.mark.parametrize("ramp", [{}, RAMP], ids=["constant", "ramp"])
def test_stopping_and_going_on_changes_no_bit(
    kind: Kind, command: Command, corpus: Corpus, tmp_path: Path, ramp: dict[str, object]
) -> None:
    def run(name: str, **others: object) -> None:
        places = {"save": tmp_path / name, "load": tmp_path / name}
        records = {"metrics_file": tmp_path / f"{name}.jsonl"}
        flags = {**kind.flags, **ramp, **places, **records, **others}
        assert command(corpus.flags(**flags)) == 0, command.err

    run("whole")
    run("stopped", exit_interval=4)
    run("stopped")
    assert "continuing after iteration 4" in command.out
    _assert_same_checkpoint(tmp_path / "stopped", tmp_path / "whole")
    for column in ("loss", "grad_norm", "batch_size"):
        values = [_column(tmp_path / f"{name}.jsonl", column) for name in ("whole", "stopped")]
        assert values[0] == values[1], column
    assert not ramp or values[0] == RAMPED_SIZES
