"""T5: an encoder, and a decoder that attends to what it has made (arXiv 1910.10683).

Positions are learned vectors, as in the Megatron lineage, or T5's bias by distance. Over a pipeline
the encoder takes the first stages and the decoder the others; through the latter the encoder's
output travels along in front of the decoder's residual stream.

Letters: s encoder's sequence, d decoder's sequence, b micro-batch, h hidden, v padded vocabulary,
t tensor size.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron.config import Config
from megatron.model.enums import ModelType
from megatron.model.language_model import TransformerLanguageModel, get_language_model
from megatron.model.module import (
    Float16Module,
    MegatronModule,
    in_half,
    new_parameter,
    to_stream,
)
from megatron.model.output_layer import OutputLayer, scaled
from megatron.mpu import ParallelState, ShardSpec, Stage
from megatron.mpu.init import zeros
from megatron.ops.attention import AttentionMask, padding_mask


class T5LMHead(nn.Module):
    """A bias for each token's score, split along the vocabulary; the weights are elsewhere.

    Without biases in linear layers there is none here.
    """

    def __init__(self, config: Config, state: ParallelState, name: str) -> None:
        super().__init__()
        vocab_size = config.model.vocab_size
        assert vocab_size is not None, "the vocabulary's size is set from the tokenizer"
        padded = config.model.padded_vocab_size(state.tensor.size)
        self.bias = None
        if not config.model.disable_bias_linear:
            spec = ShardSpec(f"{name}.bias", (vocab_size,), dim=0, padded=padded)
            self.bias = new_parameter(config, state, spec, zeros)


class T5Model(MegatronModule):
    """The part of T5 that one pipeline stage holds.

    Args:
        parallel_output: whether logits stay split along the vocabulary.
        add_encoder, add_decoder: what of both the stage is part of; by default as it says itself.
    """

    model_type = ModelType.encoder_and_decoder

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        stage: Stage,
        *,
        parallel_output: bool = True,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        add_encoder: bool | None = None,
        add_decoder: bool | None = None,
    ) -> None:
        super().__init__(
            config,
            state,
            stage,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=parallel_output,
        )
        self.language_model: TransformerLanguageModel
        self.language_model, name = get_language_model(
            config,
            state,
            stage,
            add_encoder=stage.has_encoder if add_encoder is None else add_encoder,
            add_decoder=stage.has_decoder if add_decoder is None else add_decoder,
            pre_process=self.pre_process,
            post_process=self.post_process,
        )
        self.lm_head = self.output_layer = None
        if self.post_process:
            self.lm_head = T5LMHead(config, state, "lm_head")
            if not self.share_word_embeddings:
                self.output_layer = OutputLayer(config, state, f"{name}.output_layer")
        self.initialize_word_embeddings()

    def forward(
        self,
        encoder_input_ids: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        encoder_mask: torch.Tensor,
        lm_labels: torch.Tensor | None = None,
        *,
        enc_hidden_states: torch.Tensor | None = None,
        output_enc_hidden: bool = False,
    ) -> torch.Tensor:
        """Run this stage.

        A decoder's padding stands behind all real tokens, which then cannot see it; no mask says
        where it is.

        Args:
            encoder_input_ids: i64[b, s]; decoder_input_ids: i64[b, d].
            encoder_mask: bool[b, s], True where a token of the encoder is real.
            lm_labels: i64[b, d], the token to predict at each position of the decoder.
            enc_hidden_states: [s, b, h], an encoder's output to use in place of running one.
            output_enc_hidden: end behind the encoder.

        Returns:
            What the next stage needs, or the encoder's output [s, b, h]. On the last stage the
            loss [b, d] in float32 or wider, or without labels the logits, [b, d, v / t] or,
            without ``parallel_output``, [b, d, true vocabulary].
        """
        keys = padding_mask(encoder_mask)
        hidden = self.language_model(
            encoder_input_ids,
            None,
            AttentionMask(keys=keys),
            decoder_input_ids,
            None,
            AttentionMask(causal=True),
            AttentionMask(keys=keys),
            enc_hidden_states=enc_hidden_states,
            output_enc_hidden=output_enc_hidden,
        )
        if self.lm_head is None or output_enc_hidden:
            return to_stream(hidden.to_send(), self.config)
        scored = self.loss_or_logits(
            scaled(hidden.stream, self.config),
            None if lm_labels is None else lm_labels.t(),
            self.lm_head.bias,
            split_sequence=self.config.parallel.sequence_parallel,
        )
        return scored.transpose(0, 1)


def build_t5(config: Config, state: ParallelState, stage: Stage) -> MegatronModule | Float16Module:
    """T5 as the configuration describes it, wrapped where it is in half precision."""
    return in_half(T5Model(config, state, stage))
