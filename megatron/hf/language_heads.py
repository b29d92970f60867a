"""Heads of pretraining: scores of the vocabulary, and whether one sentence follows another.

Tokens are scored by the word embeddings, or with `config.tie_word_embeddings=False` by a matrix of
their own. Either is split along the vocabulary over the tensor ranks; the scores are gathered,
without the padding.

Letters: b batch, s sequence, h hidden, v vocabulary, t tensor size.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron.hf.backbone import Top
from megatron.hf.configuration import BertFamilyConfig
from megatron.hf.heads import HeadedModel, label_loss, logger, next_token_loss
from megatron.hf.inputs import Inputs
from megatron.hf.outputs import (
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    ModelOutput,
    NextSentencePredictorOutput,
)
from megatron.model.bert_model import BertLMHead
from megatron.model.module import word_embeddings_copy
from megatron.model.output_layer import OutputLayer
from megatron.mpu import ParallelState, gather_from_tensor_region

PastKeyValues = tuple[tuple[Tensor, ...], ...]


class LanguageModel(HeadedModel):
    """A network that scores the vocabulary at every position."""

    heads: ClassVar[tuple[str, ...]] = ("lm",)
    reads_pooled = False

    def __init__(
        self, config: BertFamilyConfig, *, parallel_state: ParallelState | None = None
    ) -> None:
        super().__init__(config, parallel_state=parallel_state)
        if config.tie_word_embeddings:
            copy = getattr(self, "word_embeddings", None)
            self.bert.tie_output(None if copy is None else copy.weight)

    def _build_heads(self) -> None:
        config, state = self.native_config, self.state
        self.lm_head = BertLMHead(config, state, "lm_head")
        if not self.config.tie_word_embeddings:
            self.output_layer = OutputLayer(config, state, "language_model.output_layer")
        elif not self.stage.is_first:
            self.word_embeddings = word_embeddings_copy(config, state)

    def _output_weight(self) -> Tensor:
        """What scores the tokens, [v / t, h]."""
        if not self.config.tie_word_embeddings:
            return self.output_layer.weight
        if not self.stage.is_first:
            return self.word_embeddings.weight
        embedding = self.bert.language_model.embedding
        assert embedding is not None
        return embedding.word_embeddings.weight

    def _scores(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, v]"""
        logits = self.lm_head(hidden, self._output_weight())  # [b, s, padded v / t]
        return gather_from_tensor_region(logits, self.state.tensor)[..., : self.config.vocab_size]


class ForMaskedLM(LanguageModel):
    """The tokens that were masked, from both sides."""

    def __init__(
        self, config: BertFamilyConfig, *, parallel_state: ParallelState | None = None
    ) -> None:
        super().__init__(config, parallel_state=parallel_state)
        if config.is_decoder and self.state.rank == 0:
            logger.warning(
                "%s: with is_decoder=True a position sees only those before it; masked tokens are "
                "predicted from both sides with is_decoder=False",
                type(self).__name__,
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Logits [b, s, v], and with labels their mean cross entropy.

        Args:
            labels: i64[b, s], the tokens that were masked; -100 where none was.
        """
        inputs = Inputs(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )

        def head(top: Top) -> dict[str, Tensor | None]:
            logits = self._scores(top.last_hidden_state)
            return {"loss": label_loss(logits, labels), "logits": logits}

        return self.bert.answer(inputs, head, MaskedLMOutput, return_dict)


class ForCausalLM(LanguageModel):
    """The next token, from those before it."""

    def __init__(
        self, config: BertFamilyConfig, *, parallel_state: ParallelState | None = None
    ) -> None:
        super().__init__(config, parallel_state=parallel_state)
        if not config.is_decoder and self.state.rank == 0:
            logger.warning(
                "%s: without is_decoder=True a position sees those behind it, too, and with them "
                "the token it is to predict",
                type(self).__name__,
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: PastKeyValues | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Tensor, ...]:
        """Logits [b, s, v], and with labels the mean cross entropy of the following tokens.

        Args:
            labels: i64[b, s], as a rule the `input_ids`: position i is scored against label i + 1,
                and a label of -100 is left out. With labels there are no past_key_values in the
                output.
        """
        inputs = Inputs(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            use_cache if labels is None else False,
            output_attentions,
            output_hidden_states,
        )

        def head(top: Top) -> dict[str, Tensor | None]:
            logits = self._scores(top.last_hidden_state)
            return {"loss": next_token_loss(logits, labels), "logits": logits}

        return self.bert.answer(inputs, head, CausalLMOutputWithCrossAttentions, return_dict)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: PastKeyValues | None = None,
        attention_mask: Tensor | None = None,
        **model_kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward: with a cache, the last token alone."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if past_key_values is not None:
            input_ids = input_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }

    def _reorder_cache(self, past_key_values: PastKeyValues, beam_idx: Tensor) -> PastKeyValues:
        """The cache whose row i is row `beam_idx[i]` of the given one, for a search by beams."""
        return tuple(
            tuple(state.index_select(0, beam_idx.to(state.device)) for state in layer)
            for layer in past_key_values
        )


class ForNextSentencePrediction(HeadedModel):
    """Whether the second sentence follows the first."""

    heads = ("nsp",)

    def _build_heads(self) -> None:
        self.binary_head = self._linear("binary_head", 2)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> NextSentencePredictorOutput | tuple[Tensor, ...]:
        """Logits [b, 2], and with labels their mean cross entropy.

        Args:
            labels: i64[b], 0 where the second sentence follows the first, 1 where it does not.
            kwargs: `next_sentence_label`, the old name of labels.
        """
        if "next_sentence_label" in kwargs:
            warnings.warn(
                "next_sentence_label is the old name of labels", FutureWarning, stacklevel=2
            )
            labels = kwargs.pop("next_sentence_label")
        if kwargs:
            raise TypeError(f"forward() got an unexpected keyword argument {next(iter(kwargs))!r}")
        inputs = Inputs(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )

        def head(top: Top) -> dict[str, Tensor | None]:
            logits = self.binary_head(top.pooler_output)  # [b, 2]
            return {"loss": label_loss(logits, labels), "logits": logits}

        return self.bert.answer(inputs, head, NextSentencePredictorOutput, return_dict)


class ForPreTraining(LanguageModel):
    """Both tasks of BERT's pretraining: masked tokens and the next sentence."""

    heads = ("lm", "nsp")
    reads_pooled = True
    output_class: ClassVar[type[ModelOutput]]

    def _build_heads(self) -> None:
        super()._build_heads()
        self.binary_head = self._linear("binary_head", 2)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Tensor, ...]:
        """Logits [b, s, v] and [b, 2], and with both kinds of labels the sum of both losses.

        Args:
            labels: i64[b, s], the masked tokens; -100 is left out.
            next_sentence_label: i64[b], 0 where the second sentence follows the first, else 1.
        """
        inputs = Inputs(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )

        def head(top: Top) -> dict[str, Tensor | None]:
            scores = self._scores(top.last_hidden_state)  # [b, s, v]
            follows = self.binary_head(top.pooler_output)  # [b, 2]
            losses = label_loss(scores, labels), label_loss(follows, next_sentence_label)
            return {
                "loss": None if losses[0] is None or losses[1] is None else losses[0] + losses[1],
                "prediction_logits": scores,
                "seq_relationship_logits": follows,
            }

        return self.bert.answer(inputs, head, self.output_class, return_dict)
