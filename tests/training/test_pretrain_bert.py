"""`pretrain_bert.py` from its flags to its files, in this process."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import pretrain_bert
from megatron.monitor import read_metrics
from tests.training.command import Command
from tests.training.corpus import Corpus, write_corpus


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(pretrain_bert, capfd, monkeypatch)


def _records(path: Path) -> list[dict[str, Any]]:
    return list(read_metrics(path))


def test_a_run_learns_and_leaves_all_its_records(
    command: Command, corpus: Corpus, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert command(corpus.flags(metrics_file=metrics, log_params_norm=True)) == 0, command.err
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [step["iteration"] for step in steps] == list(range(1, 13))
    assert list(steps[0]) == [
        "iteration",
        "loss",
        "lm_loss",
        "nsp_loss",
        "grad_norm",
        "learning_rate",
        "loss_scale",
        "tokens_per_second",
        "model_tflops_per_second",
        "iteration_seconds",
        "skipped",
        "batch_size",
        "consumed_samples",
        "params_norm",
    ]
    assert steps[-1]["consumed_samples"] == 48
    assert steps[0]["loss"] == pytest.approx(steps[0]["lm_loss"] + steps[0]["nsp_loss"])
    assert steps[0]["lm_loss"] == pytest.approx(math.log(64), rel=0.05)
    evaluated = [line for line in lines if "validation_loss" in line]
    assert [line["iteration"] for line in evaluated] == [6, 12]
    assert "test_lm_loss" in lines[-1]
    assert evaluated[-1]["validation_lm_loss"] < steps[0]["lm_loss"]
    assert "iteration 12/12" in command.out


def test_an_interval_reports_the_mean_of_its_steps(
    command: Command, corpus: Corpus, tmp_path: Path
) -> None:
    each, fourth = tmp_path / "1.jsonl", tmp_path / "4.jsonl"
    assert command(corpus.flags(metrics_file=each, eval_iters=0)) == 0
    assert command(corpus.flags(metrics_file=fourth, eval_iters=0, log_interval=4)) == 0
    losses = [record["lm_loss"] for record in _records(each)]
    means = [sum(losses[i : i + 4]) / 4 for i in (0, 4, 8)]
    assert [record["lm_loss"] for record in _records(fourth)] == pytest.approx(means, rel=1e-12)


def test_tensorboard_gets_curves_at_its_own_interval(
    command: Command, corpus: Corpus, tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = {"tensorboard_dir": tmp_path, "tensorboard_log_interval": 3, "log_interval": 100}
    assert command(corpus.flags(**flags)) == 0
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in events.Scalars("lm_loss")] == [3, 6, 9, 12]
    assert [point.step for point in events.Scalars("validation_lm_loss")] == [6, 12]


def test_overflowing_steps_are_counted_and_left_out_of_the_loss(
    command: Command, corpus: Corpus, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert command(corpus.flags(metrics_file=metrics, fp16=True, eval_iters=0)) == 0
    first = _records(metrics)[0]
    assert first["skipped"] == 1 and math.isnan(first["loss"])
    assert first["loss_scale"] == 2.0**32
    assert "skipped 1" in command.out


def test_splits_without_a_share_are_not_evaluated(command: Command, corpus: Corpus) -> None:
    assert command(corpus.flags(split="1,0,0")) == 0
    assert "validation" not in command.out and "test loss" not in command.out


def test_exit_interval_saves_and_the_same_command_goes_on(
    command: Command, corpus: Corpus, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    places = {"save": tmp_path / "run", "load": tmp_path / "run", "metrics_file": metrics}
    assert command(corpus.flags(**places, exit_interval=5)) == 0
    assert "ending after iteration 5: --exit-interval 5 is reached" in command.out
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "5\n"
    assert command(corpus.flags(**places)) == 0
    assert "continuing after iteration 5" in command.out
    steps = [record["iteration"] for record in _records(metrics) if "loss" in record]
    assert steps == list(range(1, 13))
    assert command(corpus.flags(**places)) == 0
    assert "saved" not in command.out


def test_finetuning_takes_the_weights_and_starts_anew(
    command: Command, corpus: Corpus, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert command(corpus.flags(save=tmp_path / "first")) == 0
    other = {"load": tmp_path / "first", "finetune": True, "lr": 0.0, "metrics_file": metrics}
    assert command(corpus.flags(**other, train_iters=6)) == 0
    records = _records(metrics)
    assert [record["iteration"] for record in records if "loss" in record] == list(range(1, 7))
    assert records[0]["lm_loss"] < 0.97 * math.log(64)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"num_leyers": 2}, 2, "unknown flag --num-leyers: did you mean --num-layers?"),
        (
            {"tensor_model_parallel_size": 3},
            2,
            "--num-attention-heads 4 is not divisible by --tensor-model-parallel-size 3",
        ),
        ({"vocab_size": 10}, 2, "--vocab-size 10 is less than the tokenizer's 64"),
        ({"data_path": "nowhere"}, 2, "nowhere.idx does not exist"),
        ({"distributed_backend": "nccl", "use_cpu": None}, 2, "--distributed-backend nccl"),
    ],
)
def test_wrong_flags_are_one_line_each(
    command: Command, corpus: Corpus, change: dict[str, Any], code: int, message: str
) -> None:
    assert command(corpus.flags(**change)) == code
    lines = command.err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    assert sum(message in line for line in lines) == 1


def test_a_truncated_dataset_is_named(command: Command, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    path = Path(f"{corpus.prefix}.bin")
    path.write_bytes(path.read_bytes()[:-10])
    assert command(corpus.flags()) == 1
    [line] = command.err.splitlines()
    assert line.startswith("error: ") and str(path) in line


def test_a_truncated_index_is_named(command: Command, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    path = Path(f"{corpus.prefix}.idx")
    path.write_bytes(path.read_bytes()[:100])
    assert command(corpus.flags()) == 1
    [line] = command.err.splitlines()
    assert line.startswith(f"error: {path}: ")


def test_a_token_outside_the_vocabulary_is_named(command: Command, tmp_path: Path) -> None:
    assert command(write_corpus(tmp_path, largest_token=64).flags()) == 1
    errors = [line for line in command.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "is 64, outside the vocabulary of 64 tokens" in errors[0]
    assert "Traceback" not in command.err


def test_a_checkpoint_of_another_model_is_named(
    command: Command, corpus: Corpus, tmp_path: Path
) -> None:
    assert command(corpus.flags(save=tmp_path / "run", train_iters=2, eval_iters=0)) == 0
    assert command(corpus.flags(load=tmp_path / "run", hidden_size=32)) == 1
    lines = command.err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert any("--hidden-size" in line and "16" in line and "32" in line for line in lines)


def test_a_directory_without_a_checkpoint_is_named(
    command: Command, corpus: Corpus, tmp_path: Path
) -> None:
    assert command(corpus.flags(load=tmp_path)) == 1
    assert command.err == f"error: --load {tmp_path}: there is no checkpoint\n"


def test_a_profile_names_stages_micro_batches_and_layers(
    command: Command, corpus: Corpus, tmp_path: Path
) -> None:
    directory = tmp_path / "profile"
    flags = corpus.flags(profile_steps="2:3", profile_dir=directory, train_iters=4)
    assert command(flags) == 0, command.err
    assert f"profile of iterations 2:3 in {directory}" in command.out
    events = json.loads((directory / "rank0.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    ranges = Counter(name for name in names if name.startswith(("stage ", "layer ")))
    assert ranges["stage 0 micro-batch 0 forward"] == 2
    assert ranges["stage 0 micro-batch 0 backward"] == 2
    micro_batches = sum("forward" in name for name in ranges)
    assert ranges["layer 0"] == ranges["layer 1"] == 2 * micro_batches
