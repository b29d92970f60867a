"""The micro-batches of this rank, on the host, from where the run stands."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.data.loader import SampleDataset, build_loader
from megatron.data.samplers import BatchSize
from megatron.training.task import Batch
from megatron.training.trainer import Trainer


def training_batches(trainer: Trainer, dataset: SampleDataset | None) -> Iterator[Batch]:
    """What this rank still has to train on."""
    data = trainer.config.data
    return _batches(
        trainer,
        dataset,
        trainer.samples,
        trainer.ramp.at,
        num_workers=data.num_workers,
        order=data.dataloader_type,
    )


def evaluation_batches(trainer: Trainer, dataset: SampleDataset) -> Iterator[Batch]:
    """What this rank evaluates: the whole dataset, the same samples every time."""
    # Workers would be started anew for each evaluation, and cost more than they prepare.
    return _batches(trainer, dataset, 0, trainer.ramp.full, num_workers=0, order="single")


def _batches(
    trainer: Trainer,
    dataset: SampleDataset | None,
    consumed_samples: int,
    global_batch_size: BatchSize,
    *,
    num_workers: int,
    order: str,
) -> Iterator[Batch]:
    """A generator, so that no worker is started for batches that nobody asks for."""
    assert dataset is not None, "the datasets are asked for as many samples as the run takes"
    state, train = trainer.state, trainer.config.train
    yield from build_loader(
        dataset,
        consumed_samples=consumed_samples,
        micro_batch_size=train.micro_batch_size,
        data_rank=state.data.rank,
        data_size=state.data.size,
        global_batch_size=global_batch_size,
        num_workers=num_workers,
        dataloader_type=order,
        seed=train.seed,
        pin_memory=state.device.type != "cpu",
    )
