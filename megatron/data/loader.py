"""Micro-batches of tensors, prepared ahead by worker processes.

Every tensor and pipeline rank of a data rank reads the same micro-batches by itself: samples are
functions of their number, so nothing has to be broadcast.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from megatron.data.samplers import BatchSize, MicroBatchSampler
from megatron.data.samples import Sample, SampleDataset

Batch = dict[str, torch.Tensor]


def collate_samples(samples: Sequence[Sample]) -> Batch:
    """The arrays of all samples stacked: each of shape [...] becomes a tensor [b, ...]."""
    return {
        key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]
    }


def build_loader(
    dataset: SampleDataset,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    global_batch_size: BatchSize,
    num_workers: int,
    dataloader_type: str = "single",
    seed: int,
    collate: Callable[[Sequence[Sample]], Batch] = collate_samples,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The micro-batches of data rank `data_rank`, one after the other, from `consumed_samples` on.

    dataloader_type: "single" ends with the last whole global batch of the dataset, "cyclic" starts
    over in a new order. global_batch_size: a number, or what gives the samples of the global batch
    that begins after so many samples. num_workers: processes that prepare batches, which changes
    nothing in them; 0 prepares them in this process. Raises ValueError where a batch cannot be
    shared out.
    """
    sampler = MicroBatchSampler(
        len(dataset),
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        global_batch_size=global_batch_size,
        cyclic=dataloader_type == "cyclic",
        seed=seed,
    )
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]  # any object with these two methods will do
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        # Its own generator: the default would draw from the one that dropout depends on.
        generator=torch.Generator(),
    )
    return iter(loader)
