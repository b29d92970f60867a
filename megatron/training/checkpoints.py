"""What of a run is saved, and how a run continues from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from megatron.checkpoint.save_load import (
    NamedTensor,
    check_checkpoint,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from megatron.errors import CheckpointError
from megatron.optimizer import LearningRateSchedule
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
    directory = _to_continue_from(trainer)
    if directory is None:
        return False
    train = trainer.config.train
    run_state = load_checkpoint(
        directory,
        _tensors(trainer),
        config=trainer.config,
        state=trainer.state,
        optional=_histories(trainer),
    )
    if train.finetune or train.no_load_optim:
        trainer.optimizer.reload_masters()
    else:
        trainer.optimizer.load_state_dict(run_state["optimizer"])
    if not train.finetune:
        trainer.iteration, trainer.samples = run_state["iteration"], run_state["samples"]
        trainer.learning_rates = _resumed_rates(trainer, run_state)
    return True


def find_start(trainer: Trainer) -> tuple[int, int]:
    """The iteration and the samples from which a run would go on; no tensor is read or changed.

    The trainer may be on the meta device. Raises what `resume` would, but for damage within the
    data of tensors.
    """
    directory = _to_continue_from(trainer)
    if directory is None:
        return 0, 0
    run_state = check_checkpoint(
        directory,
        _tensors(trainer),
        config=trainer.config,
        state=trainer.state,
        optional=_histories(trainer),
    )
    if not run_state:
        return 0, 0
    _resumed_rates(trainer, run_state)
    return run_state["iteration"], run_state["samples"]


def _to_continue_from(trainer: Trainer) -> Path | None:
    """The directory of the checkpoint that --load names; None at the start of a run."""
    train = trainer.config.train
    if train.load is None:
        return None
    directory = Path(train.load)
    if find_checkpoint(directory, trainer.state) is None:
        if train.save is not None and directory.resolve() == Path(train.save).resolve():
            return None
        raise CheckpointError(f"--load {directory}: there is no checkpoint")
    return directory


def _histories(trainer: Trainer) -> set[str]:
    """The keys that a checkpoint may lack.

    A run that goes on in 8 bits, or with another history of scales, has none to go on from.
    """
    return {key for key, *_ in trainer.fp8_scaling.state_tensors()}


def _resumed_rates(trainer: Trainer, run_state: Mapping[str, Any]) -> LearningRateSchedule:
    options = trainer.config.optimizer
    return trainer.learning_rates.resumed(
        run_state["learning_rates"],
        override=options.override_lr_scheduler,
        use_checkpoint=options.use_checkpoint_lr_scheduler,
    )


def _tensors(trainer: Trainer) -> Iterator[NamedTensor]:
    trainer.optimizer.finish_gather()
    histories = trainer.fp8_scaling.state_tensors()
    return chain(trainer.weights, trainer.optimizer.state_tensors(), histories)
