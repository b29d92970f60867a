"""Embedding, transformer and pooler: what is below the heads of every network.

Letters: s sequence, z sequence of an encoder beside a decoder, b micro-batch, h hidden,
t tensor size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from megatron.config import Config
from megatron.model.embedding import Embedding
from megatron.model.enums import AttnMaskType, LayerType
from megatron.model.linear import WholeLinear
from megatron.model.module import parameter_dtype, splits_sequence, to_stream
from megatron.model.positions import RelativeBias, rotations
from megatron.model.probe import Extras
from megatron.model.transformer import Context, ParallelTransformer
from megatron.mpu import ParallelState, Stage, reduce_from_tensor_region
from megatron.ops.attention import AttentionMask


class Pooler(nn.Module):
    """tanh of a linear map of the hidden state at one position of each sample."""

    def __init__(self, config: Config, state: ParallelState, name: str) -> None:
        super().__init__()
        self.axis = state.tensor if splits_sequence(config, state) else None
        self.dense = WholeLinear(config, state, f"{name}.dense")

    def forward(self, hidden: torch.Tensor, sequence_index: int | torch.Tensor = 0) -> torch.Tensor:
        """[s or s / t, b, h] -> [b, h]

        With i64[b] for an index [r or r / t, 1, h] -> [b, h]: of each sample its place in the row.
        """
        if isinstance(sequence_index, torch.Tensor):
            return torch.tanh(self.dense(self._of_packed(hidden.squeeze(1), sequence_index)))
        if self.axis is None:
            return torch.tanh(self.dense(hidden[sequence_index]))
        holder, place = divmod(sequence_index, hidden.size(0))
        # The other ranks add zeros, and get zeros as gradient.
        own = hidden[place] * float(self.axis.rank == holder)
        return torch.tanh(self.dense(reduce_from_tensor_region(own, self.axis)))

    def _of_packed(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """[r or r / t, h], i64[b] -> [b, h]"""
        if self.axis is None:
            return hidden.index_select(0, places)
        rows = hidden.size(0)
        own_places = places - self.axis.rank * rows
        is_own = (own_places >= 0) & (own_places < rows)
        own = hidden.index_select(0, own_places.clamp(0, rows - 1)) * is_own.unsqueeze(1)
        return reduce_from_tensor_region(own, self.axis)


class Hidden(NamedTuple):
    """What a stage of the language model makes.

    Attributes:
        stream: the residual stream, or behind the last layer its norm, [s, b, h]; s / t positions
            with sequence parallelism.
        pooled: [b, h] where this stage has the pooler.
        encoder_output: [z, b, h] where this stage is part of a decoder.
    """

    stream: torch.Tensor
    pooled: torch.Tensor | None = None
    encoder_output: torch.Tensor | None = None

    def to_send(self) -> torch.Tensor:
        """What the next stage needs: a decoder's is given the encoder's output in front."""
        if self.encoder_output is None:
            return self.stream
        return torch.cat((self.encoder_output.to(self.stream.dtype), self.stream))


class TransformerLanguageModel(nn.Module):
    """The part of the network below the heads that one pipeline stage holds.

    Args:
        num_tokentypes: rows of the token-type embedding; 0 for none.
        add_encoder: whether the stage is part of an encoder, or of the only stack of layers.
        add_decoder: whether the stage is part of a decoder beside an encoder.
        add_pooler: whether the last stage pools.
        pre_process, post_process: whether the model begins, and ends, here.
        layer_type: of the only stack of layers: whether it also attends to what it is given of an
            encoder (see `Extras`); `cross_distances`: then with vectors for distances.
        padding_idx: the token whose embedding gets no gradient from where it was looked up.
    """

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        stage: Stage,
        *,
        num_tokentypes: int = 0,
        add_encoder: bool = True,
        add_decoder: bool = False,
        add_pooler: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
        layer_type: LayerType = LayerType.encoder,
        cross_distances: bool = False,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        name = "language_model"
        self.config, self.state = config, state
        self._input_tensor: torch.Tensor | None = None
        self.embedding: Embedding | None = None
        if pre_process or stage.begins_decoder:
            self.embedding = Embedding(
                config,
                state,
                f"{name}.embedding",
                num_tokentypes,
                is_copy=not pre_process,
                padding_idx=padding_idx,
            )
        self.encoder_bias = self.decoder_bias = None
        if config.model.position_embedding_type == "relative":
            biases = (
                RelativeBias(config, state, stage, f"{name}.{stack}.relative_bias", mask_type)
                for stack, mask_type in (
                    ("encoder", AttnMaskType.padding),
                    ("decoder", AttnMaskType.causal),
                )
            )
            self.encoder_bias, self.decoder_bias = biases
        self.encoder = self.decoder = None
        if add_encoder:
            self.encoder = ParallelTransformer(
                config,
                state,
                stage.layers,
                name=f"{name}.encoder",
                post_process=stage.ends_encoder if stage.split is not None else post_process,
                layer_type=layer_type,
                cross_distances=cross_distances,
            )
        if add_decoder:
            self.decoder = ParallelTransformer(
                config,
                state,
                stage.decoder_layers,
                name=f"{name}.decoder",
                post_process=post_process,
                layer_type=LayerType.decoder,
            )
        self.pooler = (
            Pooler(config, state, f"{name}.pooler") if add_pooler and post_process else None
        )

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """Give what the previous stage sent, for the next forward."""
        self._input_tensor = input_tensor

    def forward(
        self,
        enc_input_ids: torch.Tensor,
        enc_position_ids: torch.Tensor | None,
        enc_attn_mask: AttentionMask,
        dec_input_ids: torch.Tensor | None = None,
        dec_position_ids: torch.Tensor | None = None,
        dec_attn_mask: AttentionMask | None = None,
        enc_dec_attn_mask: AttentionMask | None = None,
        *,
        tokentype_ids: torch.Tensor | None = None,
        pooling_sequence_index: int | torch.Tensor = 0,
        enc_hidden_states: torch.Tensor | None = None,
        output_enc_hidden: bool = False,
        extras: Extras | None = None,
    ) -> Hidden:
        """Run this stage.

        Args:
            enc_input_ids, enc_position_ids, tokentype_ids: i64[b, s], used by the first stage.
            enc_attn_mask: what a position may see.
            dec_input_ids, dec_position_ids, dec_attn_mask: the same of the decoder.
            enc_dec_attn_mask: what the decoder may see of the encoder's output.
            pooling_sequence_index: the position that the pooler reads; i64[b] of samples in a row.
            enc_hidden_states: [s, b, h], an encoder's output to use in place of running one.
            output_enc_hidden: end behind the encoder, though there is a decoder.
            extras: what else the only stack of layers is given, and leaves behind.
        """
        received, self._input_tensor = self._input_tensor, None
        stream, encoder_output = received, enc_hidden_states
        if self.encoder is not None and encoder_output is None:
            if received is None:
                embeds = None if extras is None else extras.inputs_embeds
                stream = self._embed(enc_input_ids, enc_position_ids, tokentype_ids, embeds)
            assert stream is not None
            context = self._context(enc_input_ids, enc_position_ids, enc_attn_mask, "encoder")
            if extras is not None:
                context = context.with_extras(extras)
            stream = self.encoder(stream, context)
            if self.decoder is None or output_enc_hidden:
                pooled = (
                    None if self.pooler is None else self.pooler(stream, pooling_sequence_index)
                )
                return Hidden(stream, pooled)
            encoder_output, stream = stream, None
        assert self.decoder is not None and dec_input_ids is not None
        assert dec_attn_mask is not None and enc_dec_attn_mask is not None
        if encoder_output is None:
            encoder_output, stream = self._parts_of(received, enc_input_ids.size(1))
        if self.embedding is not None:
            stream = self._embed(dec_input_ids, dec_position_ids, None)
        context = self._context(dec_input_ids, dec_position_ids, dec_attn_mask, "decoder")
        encoder_output = encoder_output.to(self._dtype)
        stream = self.decoder(stream, context.beside(encoder_output, enc_dec_attn_mask))
        return Hidden(stream, encoder_output=encoder_output)

    @property
    def _dtype(self) -> torch.dtype:
        """The parameters' number format, which may have been changed since they were made."""
        first = next(self.parameters(), None)
        return parameter_dtype(self.config) if first is None else first.dtype

    def _embed(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        tokentype_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert self.embedding is not None, "set_input_tensor before a later stage's forward"
        x = self.embedding(input_ids, position_ids, tokentype_ids, inputs_embeds)
        return to_stream(x, self.config)

    def _parts_of(
        self, received: torch.Tensor | None, encoder_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's output and the decoder's stream, which is empty where that begins."""
        assert received is not None, "set_input_tensor before a later stage's forward"
        split = splits_sequence(self.config, self.state)
        rows = encoder_length // self.state.tensor.size if split else encoder_length
        return received[:rows], received[rows:]

    def _context(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        mask: AttentionMask,
        stack: str,
    ) -> Context:
        length = input_ids.size(1)
        relative = self.encoder_bias if stack == "encoder" else self.decoder_bias
        if relative is not None:
            mask = mask.with_bias(relative(length, length))
        rotation = rotations(self.config, length, position_ids, self._dtype, input_ids.device)
        return Context(mask, rotation)


def get_language_model(
    config: Config, state: ParallelState, stage: Stage, **options: Any
) -> tuple[TransformerLanguageModel, str]:
    """The language model of a stage, with the options of its class, and its name in a network."""
    return TransformerLanguageModel(config, state, stage, **options), "language_model"
