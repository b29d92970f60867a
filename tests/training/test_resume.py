"""A run that is saved and goes on in another process ends with the same bits, on any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.mpu import ParallelState
from megatron.training import checkpoints
from megatron.training.batches import training_batches
from megatron.training.initialize import rank_grid
from megatron.training.trainer import Trainer
from tests.distributed import distributed
from tests.training.tiny import TASKS, Samples, random_samples, tiny_config

DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
TRAIN = {
    "micro_batch_size": 1,
    "global_batch_size": 8,
    "rampup_batch_size": (4, 4, 12),
    "train_iters": None,
    "train_samples": 40,
}
SAVED_AFTER = 2  # steps, in the middle of the ramp


def _trainer(state: ParallelState, directory: Path | None = None, **sections: Any) -> Trainer:
    """One that goes on from `directory`, if it is given."""
    config = tiny_config(**sections, train=TRAIN)
    train = replace(config.train, load=None if directory is None else str(directory))
    config = replace(config, train=train)
    kind = TASKS[config.model.model_type]
    # Random samples know no tokenizer whose files could be kept.
    task = type(kind.__name__, (kind,), {"tokenizer_files": ()})(config)
    trainer = Trainer(config, task, state)
    assert checkpoints.resume(trainer) is (directory is not None)
    return trainer


def _finish(trainer: Trainer, save_to: Path | None = None) -> list[Any]:
    """What every step to the end of the run gives."""
    dataset = Samples(random_samples(40, 3, trainer.config.model.model_type))
    history = []
    for step in trainer.steps(training_batches(trainer, dataset)):
        history.append((step.iteration, step.batch_size, step.parts.tolist(), step.grad_norm))
        if save_to is not None and step.iteration == SAVED_AFTER:
            checkpoints.save(trainer, save_to)
    return history


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ({}, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        (
            {"model_type": "gpt", "num_layers": 4, "fp64": False, "bf16": True},
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_per_virtual_pipeline_stage": 1,
                "use_distributed_optimizer": True,
            },
        ),
        (
            {"model_type": "gpt", "num_layers": 4},
            {"pipeline_model_parallel_size": 4, "pipeline_schedule": "zb-2p"},
        ),
        (
            {"model_type": "t5", "fp64": False},
            {
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "pipeline_model_parallel_size": 2,
                "recompute_granularity": "full",
            },
        ),
        (
            {
                "model_type": "gpt",
                "hidden_size": 32,
                "fp64": False,
                "bf16": True,
                "fp8_format": "hybrid",
                "fp8_recipe": "delayed",
            },
            {
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "use_distributed_optimizer": True,
            },
        ),
    ],
    ids=["bert", "gpt-interleaved", "gpt-zb-2p", "t5", "gpt-8-bits"],
)
@distributed(4)
def test_going_on_from_a_checkpoint_changes_no_bit(
    tmp_path: Path, model: dict[str, Any], parallel: dict[str, Any]
) -> None:
    sections = {"model": model | DROPOUT, "parallel": parallel}
    state = ParallelState.create(rank_grid(tiny_config(**sections), 4))
    whole = _trainer(state, **sections)
    expected = _finish(whole, save_to=tmp_path)
    assert [batch for _, batch, _, _ in expected] == [4, 4, 4, 8, 8, 8]
    resumed = _trainer(state, tmp_path, **sections)
    assert _finish(resumed) == expected[SAVED_AFTER:]
    for (name, found, _), (_, weight, _) in zip(resumed.weights, whole.weights, strict=True):
        assert torch.equal(found, weight), name
    whole.finish()
    resumed.finish()
