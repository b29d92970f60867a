"""Batches of random tokens for BERT, such as steps are timed on."""

from __future__ import annotations

import torch

from megatron.config import Config
from megatron.training.task import Batch


def random_batches(config: Config, count: int) -> list[Batch]:
    """Micro-batches of random tokens without padding, 15 % of them masked."""
    generator = torch.Generator().manual_seed(0)
    b, s = config.train.micro_batch_size, config.data.seq_length
    k = int(config.data.mask_prob * s)
    vocabulary = config.model.vocab_size
    assert vocabulary is not None

    def batch() -> Batch:
        ids = torch.randint(vocabulary, (b, s), generator=generator)
        order = torch.rand(b, s, generator=generator).argsort(dim=1)
        return {
            "input_ids": ids,
            "tokentype_ids": (torch.arange(s) >= s // 2).long().expand(b, s).contiguous(),
            "attention_mask": torch.ones(b, s, dtype=torch.bool),
            "masked_positions": order[:, :k],
            "masked_labels": ids.gather(1, order[:, :k]),
            "masked_weights": torch.ones(b, k),
            "is_random": torch.randint(2, (b,), generator=generator),
        }

    return [batch() for _ in range(count)]
