"""A run goes over to 8 bits, and back, at any of its checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.mpu import ParallelState
from megatron.training import checkpoints
from megatron.training.batches import training_batches
from megatron.training.gpt import GPTPretraining
from megatron.training.trainer import Trainer
from tests.training.tiny import Samples, random_samples, tiny_config

BF16 = {"model_type": "gpt", "fp64": False, "bf16": True, "hidden_dropout": 0.1}
DELAYED = {"fp8_format": "hybrid", "fp8_recipe": "delayed"}
LONGER = DELAYED | {"fp8_amax_history_len": 3}


class _Task(GPTPretraining):
    tokenizer_files = ()  # random samples know no tokenizer


def _trainer(model: dict[str, Any], load: Path | None = None) -> Trainer:
    config = tiny_config(model=BF16 | model)
    train = replace(config.train, load=None if load is None else str(load))
    config = replace(config, train=train)
    trainer = Trainer(config, _Task(config), ParallelState.single())
    checkpoints.resume(trainer)
    return trainer


def _histories(trainer: Trainer) -> list[torch.Tensor]:
    return [history.clone() for _, history, _ in trainer.fp8_scaling.state_tensors()]


def _run(trainer: Trainer, stop_after: int | None = None) -> list[list[float]]:
    """Losses and norms of the steps up to one of them, or to the end."""
    dataset = Samples(random_samples(16, 3, "gpt"))
    history = []
    for step in trainer.steps(training_batches(trainer, dataset)):
        history.append([*step.parts.tolist(), step.grad_norm.item()])
        if step.iteration == stop_after:
            break
    return history


def _saved(model: dict[str, Any], directory: Path) -> Trainer:
    """The run, saved after two of its four steps."""
    trainer = _trainer(model)
    _run(trainer, stop_after=2)
    checkpoints.save(trainer, directory)
    return trainer


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
def test_going_on_in_8_bits_changes_no_bit(tmp_path: Path, fp8_format: str, recipe: str) -> None:
    model = {"fp8_format": fp8_format, "fp8_recipe": recipe}
    whole = _saved(model, tmp_path)
    resumed = _trainer(model, tmp_path)
    assert (len(_histories(resumed)) > 0) == (recipe == "delayed")
    for found, history in zip(_histories(resumed), _histories(whole), strict=True):
        assert found[:2].count_nonzero() == 6  # two steps, three factors
        assert torch.equal(found, history)
    assert _run(resumed) == _run(whole)
    for (name, found, _), (_, weight, _) in zip(resumed.weights, whole.weights, strict=True):
        assert torch.equal(found, weight), name


@pytest.mark.parametrize("before", [{}, LONGER], ids=["bf16", "another-history"])
def test_a_history_that_is_not_there_begins_anew(tmp_path: Path, before: dict[str, Any]) -> None:
    saved = _saved(before, tmp_path)
    resumed = _trainer(DELAYED, tmp_path)
    assert resumed.iteration == 2
    assert not any(history.any() for history in _histories(resumed))
    torch.testing.assert_close(_run(resumed), _run(saved), rtol=0.05, atol=0)
    assert all(history.any() for history in _histories(resumed))


@pytest.mark.parametrize("other", [{}, {"fp8_format": "e4m3"}], ids=["bf16", "tensorwise"])
def test_a_run_in_8_bits_goes_on_without_a_history(tmp_path: Path, other: dict[str, Any]) -> None:
    saved = _saved(DELAYED, tmp_path)
    resumed = _trainer(other, tmp_path)
    assert resumed.iteration == 2 and not _histories(resumed)
    torch.testing.assert_close(_run(resumed), _run(saved), rtol=0.05, atol=0)
