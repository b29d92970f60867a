"""Tokens, positions and token types to vectors.

With sequence parallelism a rank gets the vectors of its own s/t positions: the word embeddings'
sum over the tensor ranks ends in a reduce-scatter, and the other tables are looked up at those
positions alone, so that their gradients are terms of a sum over the tensor ranks.

Letters: s sequence, b micro-batch, h hidden, t tensor size.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron.config import Config
from megatron.model.initial import init_methods
from megatron.model.module import new_parameter, parameter_dtype, splits_sequence
from megatron.model.residual import Norm, StreamDropout
from megatron.mpu import ParallelState, ShardSpec, VocabParallelEmbedding
from megatron.mpu.collectives import own_piece
from megatron.mpu.init import zeros
from megatron.mpu.layers import embedding_lookup


class Embedding(nn.Module):
    """Sum of word embeddings and, where there are any, position and token-type embeddings.

    Args:
        is_copy: whether this is a decoder's copy of the embedding on the first stage: zeros, until
            it is made equal (see `MegatronModule.initialize_word_embeddings`).
        padding_idx: the token whose embedding gets no gradient from where it was looked up.
    """

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        name: str,
        num_tokentypes: int = 0,
        *,
        is_copy: bool = False,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        model = config.model
        assert model.vocab_size is not None, "the vocabulary's size is set from the tokenizer"
        self.axis = state.tensor if splits_sequence(config, state) else None
        self.dropout = StreamDropout(config, state)
        self.padding_idx = padding_idx
        own, owner = (f"{name}_copy", name) if is_copy else (name, None)
        self.word_embeddings = VocabParallelEmbedding(
            model.vocab_size,
            model.hidden_size,
            name=f"{own}.word_embeddings",
            tied_to=f"{owner}.word_embeddings.weight" if owner else None,
            padded=model.padded_vocab_size(state.tensor.size),
            state=state,
            init_method=zeros if is_copy else init_methods(config)[0],
            dtype=parameter_dtype(config),
            sequence_parallel=config.parallel.sequence_parallel,
        )
        self.position_embeddings = (
            _Table(config, state, own, owner, "position_embeddings", model.max_position_embeddings)
            if model.position_embedding_type == "learned_absolute"
            else None
        )
        self.tokentype_embeddings = (
            _Table(config, state, own, owner, "tokentype_embeddings", num_tokentypes)
            if num_tokentypes
            else None
        )

        self.layernorm = (
            Norm(config, state, f"{own}.layernorm") if model.norm_position == "post" else None
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        tokentype_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """i64[b, s] each -> [s, b, h], or [s / t, b, h] with sequence parallelism.

        Positions count from 0 where they are not given. `inputs_embeds` [b, s, h] stand in place
        of the word embeddings.
        """
        x = self._words(input_ids) if inputs_embeds is None else inputs_embeds.transpose(0, 1)
        if self.position_embeddings is not None:
            if position_ids is None:
                rows = self.position_embeddings.weight[: input_ids.size(1)]
                x = x + self._own_positions(rows).unsqueeze(1)
            else:
                x = x + self.position_embeddings(self._own_positions(position_ids.t()))
        if self.tokentype_embeddings is not None:
            if tokentype_ids is None:
                tokentype_ids = torch.zeros_like(input_ids)
            x = x + self.tokentype_embeddings(self._own_positions(tokentype_ids.t()))
        return self.dropout(x if self.layernorm is None else self.layernorm(x))

    def _words(self, input_ids: torch.Tensor) -> torch.Tensor:
        """i64[b, s] -> [s or s / t, b, h]"""
        # The ids are transposed rather than what is looked up: b s numbers instead of b s h.
        ids = input_ids.t()
        x = self.word_embeddings(ids)
        if self.padding_idx is None:
            return x
        is_padding = self._own_positions(ids == self.padding_idx).unsqueeze(-1)
        return torch.where(is_padding, x.detach(), x)

    def _own_positions(self, sequence: torch.Tensor) -> torch.Tensor:
        """[s, ...] -> the part of this rank."""
        return sequence if self.axis is None else own_piece(sequence, self.axis, dim=0)


class _Table(nn.Module):
    """An embedding that every tensor rank holds whole."""

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        own: str,
        owner: str | None,
        table: str,
        rows: int,
    ) -> None:
        super().__init__()
        spec = ShardSpec(
            f"{own}.{table}.weight",
            (rows, config.model.hidden_size),
            tied_to=f"{owner}.{table}.weight" if owner else None,
            partial=splits_sequence(config, state),
        )
        init = zeros if owner else init_methods(config)[0]
        self.weight = new_parameter(config, state, spec, init)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """i64[...] -> [..., h]"""
        return embedding_lookup(ids, self.weight)
