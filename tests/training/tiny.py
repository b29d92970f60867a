"""A BERT of a few thousand weights, and batches of random tokens for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.training.task import Batch

VOCABULARY, SEQUENCE, MASKED = 50, 16, 3


def tiny_config(
    *,
    model: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
) -> Config:
    """A configuration of two layers in float64, without dropout, to be varied by section."""
    network = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "max_position_embeddings": SEQUENCE,
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 8,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "fp64": True,
    }
    run = {"micro_batch_size": 2, "global_batch_size": 4, "train_iters": 4}
    return Config(
        model=ModelConfig(**network | (model or {})),
        parallel=ParallelConfig(use_cpu=True, **parallel or {}),
        optimizer=OptimizerConfig(lr=1e-2),
        data=DataConfig(seq_length=SEQUENCE),
        train=TrainConfig(**run | (train or {})),
    )


def random_samples(count: int, seed: int) -> list[Batch]:
    """Batches of one sample each, of 0 to MASKED masked tokens."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    return [
        {
            "input_ids": integers(VOCABULARY, 1, SEQUENCE),
            "tokentype_ids": integers(2, 1, SEQUENCE),
            "attention_mask": torch.arange(SEQUENCE)[None] < integers(SEQUENCE, 1, 1) + 1,
            "masked_positions": integers(SEQUENCE, 1, MASKED),
            "masked_labels": integers(VOCABULARY, 1, MASKED),
            "masked_weights": (torch.arange(MASKED)[None] < integers(MASKED + 1, 1, 1)).float(),
            "is_random": integers(2, 1),
        }
        for _ in range(count)
    ]


def micro_batches(samples: list[Batch], size: int) -> list[Batch]:
    """The samples in batches of `size`."""
    groups = [samples[i : i + size] for i in range(0, len(samples), size)]
    return [{key: torch.cat([one[key] for one in group]) for key in group[0]} for group in groups]
