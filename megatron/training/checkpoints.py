"""What of a run is saved, and how a run continues from it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from megatron.checkpoint.save_load import (
    NamedTensor,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from megatron.errors import CheckpointError
from megatron.training.trainer import Trainer


def save(trainer: Trainer, directory: Path) -> None:
    """Makes the run's state the latest checkpoint in `directory`; every rank must call it."""
    run_state = {
        "iteration": trainer.iteration,
        "samples": trainer.samples,
        "optimizer": trainer.optimizer.state_dict(),
        "learning_rates": trainer.learning_rates.state_dict(),
    }
    save_checkpoint(
        directory,
        trainer.iteration,
        _tensors(trainer),
        run_state,
        config=trainer.config,
        state=trainer.state,
        files=trainer.task.tokenizer_files,
    )


def resume(trainer: Trainer) -> bool:
    """Continues from the checkpoint that --load names; False where there is none to continue from.

    Where --load and --save name one directory, its being empty means that the run is at its start.

    Raises:
        CheckpointError: there is none elsewhere, or it is damaged or of another model.
        ConfigError: its learning-rate schedule is not that of the flags.
    """
    train = trainer.config.train
    if train.load is None:
        return False
    directory = Path(train.load)
    if find_checkpoint(directory, trainer.state) is None:
        if train.save is not None and directory.resolve() == Path(train.save).resolve():
            return False
        raise CheckpointError(f"--load {directory}: there is no checkpoint")
    # A run that goes on in 8 bits, or with another history of scales, has none to go on from.
    histories = {key for key, *_ in trainer.fp8_scaling.state_tensors()}
    run_state = load_checkpoint(
        directory,
        _tensors(trainer),
        config=trainer.config,
        state=trainer.state,
        optional=histories,
    )
    if train.finetune or train.no_load_optim:
        trainer.optimizer.reload_masters()
    else:
        trainer.optimizer.load_state_dict(run_state["optimizer"])
    if not train.finetune:
        options = trainer.config.optimizer
        trainer.iteration, trainer.samples = run_state["iteration"], run_state["samples"]
        trainer.learning_rates = trainer.learning_rates.resumed(
            run_state["learning_rates"],
            override=options.override_lr_scheduler,
            use_checkpoint=options.use_checkpoint_lr_scheduler,
        )
    return True


def _tensors(trainer: Trainer) -> Iterator[NamedTensor]:
    trainer.optimizer.finish_gather()
    histories = trainer.fp8_scaling.state_tensors()
    return chain(trainer.weights, trainer.optimizer.state_tensors(), histories)
