"""Networks of a few thousand weights, and batches of random tokens for them."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
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
from megatron.training.bert import BertPretraining
from megatron.training.gpt import GPTPretraining
from megatron.training.t5 import T5Pretraining
from megatron.training.task import Batch

TASKS = {"bert": BertPretraining, "gpt": GPTPretraining, "t5": T5Pretraining}

VOCABULARY, SEQUENCE, TARGET, MASKED = 50, 16, 8, 3


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
        data=DataConfig(seq_length=SEQUENCE, decoder_seq_length=TARGET, num_workers=0),
        train=TrainConfig(**run | (train or {})),
    )


def random_samples(count: int, seed: int, model_type: str = "bert") -> list[Batch]:
    """Batches of one sample each, of different numbers of tokens that count, for a model."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def weights(length: int, least: int = 0) -> Tensor:
        real = least + integers(length + 1 - least, 1, 1)
        return (torch.arange(length)[None] < real).float()

    def bert() -> Batch:
        return {
            "input_ids": integers(VOCABULARY, 1, SEQUENCE),
            "tokentype_ids": integers(2, 1, SEQUENCE),
            "attention_mask": weights(SEQUENCE, least=1).bool(),
            "masked_positions": integers(SEQUENCE, 1, MASKED),
            "masked_labels": integers(VOCABULARY, 1, MASKED),
            "masked_weights": weights(MASKED),
            "is_random": integers(2, 1),
        }

    def gpt() -> Batch:
        return {
            "tokens": integers(VOCABULARY, 1, SEQUENCE + 1),
            "loss_weights": weights(SEQUENCE),
            "document_lengths": torch.tensor(
                [[first := 1 + int(integers(9, 1)), SEQUENCE - first]]
            ),
        }

    def t5() -> Batch:
        return {
            "encoder_ids": integers(VOCABULARY, 1, SEQUENCE),
            "decoder_ids": integers(VOCABULARY, 1, TARGET),
            "labels": integers(VOCABULARY, 1, TARGET),
            "loss_weights": weights(TARGET),
            "encoder_mask": weights(SEQUENCE, least=1).bool(),
        }

    make = {"bert": bert, "gpt": gpt, "t5": t5}[model_type]
    return [make() for _ in range(count)]


class Samples:
    """Batches of one sample each as a dataset."""

    def __init__(self, samples: list[Batch]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        return {name: field[0].numpy() for name, field in self._samples[index].items()}


def micro_batches(samples: list[Batch], size: int) -> list[Batch]:
    """The samples in batches of `size`."""
    groups = [samples[i : i + size] for i in range(0, len(samples), size)]
    return [{key: torch.cat([one[key] for one in group]) for key in group[0]} for group in groups]
