"""Embedding, transformer and pooler: what is below the heads of every network.

Letters: s sequence, b micro-batch, h hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config import Config
from megatron.model.module import new_parameter, parameter_dtype
from megatron.model.transformer import ParallelTransformer, init_methods
from megatron.mpu import ParallelState, ShardSpec, Stage, VocabParallelEmbedding
from megatron.mpu.init import zeros
from megatron.mpu.layers import embedding_lookup, linear


class WholeLinear(nn.Module):
    """x W^T + b that every tensor rank holds and computes whole."""

    def __init__(
        self, config: Config, state: ParallelState, name: str, output_size: int | None = None
    ) -> None:
        super().__init__()
        h = config.model.hidden_size
        out = h if output_size is None else output_size
        init, _ = init_methods(config)
        self.weight = new_parameter(config, state, ShardSpec(f"{name}.weight", (out, h)), init)
        self.bias = new_parameter(config, state, ShardSpec(f"{name}.bias", (out,)), zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., out]"""
        return linear(x, self.weight, self.bias)


class Pooler(nn.Module):
    """tanh of a linear map of one position's hidden state."""

    def __init__(self, config: Config, state: ParallelState, name: str) -> None:
        super().__init__()
        self.dense = WholeLinear(config, state, f"{name}.dense")

    def forward(self, hidden: torch.Tensor, sequence_index: int = 0) -> torch.Tensor:
        """[s, b, h] -> [b, h]"""
        return torch.tanh(self.dense(hidden[sequence_index]))


class Embedding(nn.Module):
    """Sum of word, position and, where there are any, token-type embeddings."""

    def __init__(
        self, config: Config, state: ParallelState, name: str, num_tokentypes: int = 0
    ) -> None:
        super().__init__()
        model, dtype = config.model, parameter_dtype(config)
        assert model.vocab_size is not None, "the vocabulary's size is set from the tokenizer"
        self.dropout = model.hidden_dropout
        init, _ = init_methods(config)
        self.word_embeddings = VocabParallelEmbedding(
            model.vocab_size,
            model.hidden_size,
            name=f"{name}.word_embeddings",
            padded=model.padded_vocab_size(state.tensor.size),
            state=state,
            init_method=init,
            dtype=dtype,
        )
        self.position_embeddings = _Table(
            config, state, f"{name}.position_embeddings", model.max_position_embeddings
        )
        self.tokentype_embeddings = (
            _Table(config, state, f"{name}.tokentype_embeddings", num_tokentypes)
            if num_tokentypes
            else None
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        tokentype_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """i64[b, s] each -> [s, b, h]; positions count from 0 where they are not given."""
        # The ids are transposed rather than what is looked up: b s numbers instead of b s h.
        x = self.word_embeddings(input_ids.t())
        if position_ids is None:
            x = x + self.position_embeddings.weight[: input_ids.size(1), None]
        else:
            x = x + self.position_embeddings(position_ids.t())
        if self.tokentype_embeddings is not None:
            if tokentype_ids is None:
                tokentype_ids = torch.zeros_like(input_ids)
            x = x + self.tokentype_embeddings(tokentype_ids.t())
        return F.dropout(x, self.dropout, self.training)


class _Table(nn.Module):
    """An embedding that every tensor rank holds whole."""

    def __init__(self, config: Config, state: ParallelState, name: str, rows: int) -> None:
        super().__init__()
        spec = ShardSpec(f"{name}.weight", (rows, config.model.hidden_size))
        self.weight = new_parameter(config, state, spec, init_methods(config)[0])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """i64[...] -> [..., h]"""
        return embedding_lookup(ids, self.weight)


class TransformerLanguageModel(nn.Module):
    """The part of the network below the heads that one pipeline stage holds."""

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        stage: Stage,
        *,
        num_tokentypes: int = 0,
        add_pooler: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> None:
        super().__init__()
        name = "language_model"
        self._input_tensor: torch.Tensor | None = None
        self.embedding = (
            Embedding(config, state, f"{name}.embedding", num_tokentypes) if pre_process else None
        )
        self.encoder = ParallelTransformer(
            config, state, stage, name=f"{name}.encoder", post_process=post_process
        )
        self.pooler = (
            Pooler(config, state, f"{name}.pooler") if add_pooler and post_process else None
        )

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """Give the activation [s, b, h] that the previous stage sent, for the next forward."""
        self._input_tensor = input_tensor

    def forward(
        self,
        enc_input_ids: torch.Tensor,
        enc_position_ids: torch.Tensor | None,
        enc_attn_mask: torch.Tensor | None,
        *,
        tokentype_ids: torch.Tensor | None = None,
        pooling_sequence_index: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run this stage.

        Args:
            enc_input_ids, enc_position_ids, tokentype_ids: i64[b, s], used by the first stage.
            enc_attn_mask: bool, broadcastable to [b, n, s, s]; True where a query may look.
            pooling_sequence_index: the position that the pooler reads.

        Returns:
            hidden states [s, b, h], and the pooled [b, h] where this stage has the pooler.
        """
        if self.embedding is not None:
            x = self.embedding(enc_input_ids, enc_position_ids, tokentype_ids)
        else:
            assert self._input_tensor is not None, "set_input_tensor before a later stage's forward"
            x, self._input_tensor = self._input_tensor, None
        x = self.encoder(x, enc_attn_mask)
        pooled = None if self.pooler is None else self.pooler(x, pooling_sequence_index)
        return x, pooled


def get_language_model(
    config: Config, state: ParallelState, stage: Stage, **options: Any
) -> tuple[TransformerLanguageModel, str]:
    """The language model of a stage, with the options of its class, and its name in a network."""
    return TransformerLanguageModel(config, state, stage, **options), "language_model"
