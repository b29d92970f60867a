"""Small configurations, random tensors with random splits, and what a rank holds of them."""

from __future__ import annotations

import random
from typing import Any

import torch

from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.mpu.shard_spec import ShardSpec


def make_config(*, train: dict[str, Any] | None = None, **model: Any) -> Config:
    """A configuration of a tiny model, with the given fields of its model and train sections."""
    sizes = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "max_position_embeddings": 12,
        "vocab_size": 61,
    }
    return Config(
        model=ModelConfig(**(sizes | model)),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1e-3),
        data=DataConfig(seq_length=12),
        train=TrainConfig(micro_batch_size=2, **(train or {})),
    )


def random_spec(name: str, rng: random.Random, *, multiple: int) -> ShardSpec:
    """A random shape and split whose blocks divide by `multiple`: the sizes of tensor groups."""
    shape = [rng.randint(1, 5) for _ in range(rng.randint(0, 3))]
    if not shape or rng.random() < 0.2:
        return ShardSpec(name, tuple(shape))
    dim = rng.randrange(len(shape))
    blocks = tuple(multiple * rng.randint(1, 2) for _ in range(rng.randint(1, 3)))
    padded = sum(blocks)
    # Up to all but one row of the last block is padding.
    shape[dim] = padded - rng.randrange(blocks[-1])
    stated = () if len(blocks) == 1 and rng.random() < 0.5 else blocks
    return ShardSpec(name, tuple(shape), dim=dim, blocks=stated, padded=padded)


def values(spec: ShardSpec, seed: int = 0) -> torch.Tensor:
    """The global tensor of `spec`: random, the same for the same name and seed."""
    generator = torch.Generator().manual_seed(hash_name(spec.key) + seed)
    return torch.randn(spec.shape, generator=generator)


def hash_name(name: str) -> int:
    """A number made of the name, the same in every process."""
    return int.from_bytes(name.encode()[-7:], "little")


def local_part(whole: torch.Tensor, spec: ShardSpec, rank: int, size: int) -> torch.Tensor:
    """What tensor rank `rank` of `size` holds of a global tensor; its padding is not a number."""
    local = torch.full(spec.local_shape(size), torch.nan)
    for box in spec.rectangles(rank, size):
        local[box.local_slices] = whole[box.global_slices]
    return local
