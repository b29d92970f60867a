"""`pretrain_bert.py --pack-sequences` trains as it does without, evaluation included."""

from __future__ import annotations

from pathlib import Path

import pytest

import pretrain_bert
from megatron.monitor import read_metrics
from tests.training.command import Command
from tests.training.corpus import Corpus


def test_a_packed_run_reports_the_same_losses(
    corpus: Corpus,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = Command(pretrain_bert, capfd, monkeypatch)
    same = {"fp64": True, "hidden_dropout": 0, "attention_dropout": 0}
    records = []
    for packs in (None, True):
        metrics = tmp_path / f"packed-{packs}.jsonl"
        flags = corpus.flags(**same, metrics_file=metrics, train_iters=6, pack_sequences=packs)
        assert command(flags) == 0, command.err
        records.append(list(read_metrics(metrics)))
    compared = 0
    for padded, packed in zip(*records, strict=True):
        assert padded.keys() == packed.keys()
        for name in padded:
            if name.endswith("loss") or name == "grad_norm":
                assert packed[name] == pytest.approx(padded[name], rel=1e-10)
                compared += 1
    assert compared > 6 * 3
