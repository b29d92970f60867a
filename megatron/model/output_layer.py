"""From hidden states to scores of tokens, where the word embeddings are not enough for it."""

from __future__ import annotations

import torch
from torch import nn

from megatron.config import Config
from megatron.model.initial import init_methods
from megatron.model.module import new_parameter
from megatron.mpu import ParallelState, ShardSpec


class OutputLayer(nn.Module):
    """An output layer of its own: a weight for each token, split along the vocabulary."""

    def __init__(self, config: Config, state: ParallelState, name: str) -> None:
        super().__init__()
        vocab_size = config.model.vocab_size
        assert vocab_size is not None, "the vocabulary's size is set from the tokenizer"
        spec = ShardSpec(
            f"{name}.weight",
            (vocab_size, config.model.hidden_size),
            dim=0,
            padded=config.model.padded_vocab_size(state.tensor.size),
        )
        self.weight = new_parameter(config, state, spec, init_methods(config)[0])


def scaled(hidden: torch.Tensor, config: Config) -> torch.Tensor:
    """The hidden states that tokens are scored from, [..., h], times the factor that they have."""
    scale = config.model.logit_scale
    return hidden if scale == 1.0 else hidden * scale
