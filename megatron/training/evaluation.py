"""A finished run's weights on one process, to evaluate them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from megatron.checkpoint.reader import load_config
from megatron.config import Config, ParallelConfig
from megatron.mpu import ParallelState
from megatron.training import checkpoints
from megatron.training.task import Task
from megatron.training.trainer import Trainer


def open_for_evaluation(
    directory: Path, make_task: Callable[[Config], Task], device: torch.device | str = "cpu"
) -> Trainer:
    """The weights of the latest checkpoint in `directory`, whatever layout saved them.

    `Trainer.evaluate` of the result gives the loss on any batches of the run's micro-batch size.
    Raises CheckpointError where the checkpoint is missing or damaged.
    """
    saved = load_config(directory)
    config = replace(
        saved,
        parallel=ParallelConfig(),
        train=replace(
            saved.train,
            global_batch_size=None,
            rampup_batch_size=None,
            load=str(directory),
            finetune=True,
        ),
    )
    trainer = Trainer(config, make_task(config), ParallelState.single(device))
    checkpoints.resume(trainer)
    return trainer
