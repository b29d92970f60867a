"""Heads that answer a question about a text: its class, the right choice, a tag a token, a span.

Letters: b batch, s sequence, h hidden, c labels, n choices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron.errors import ConfigError
from megatron.hf.backbone import Top
from megatron.hf.configuration import BertFamilyConfig
from megatron.hf.heads import (
    HeadedModel,
    label_loss,
    problem_type,
    sequence_loss,
    span_loss,
)
from megatron.hf.inputs import Inputs
from megatron.hf.outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from megatron.mpu import ParallelState


class LabelledModel(HeadedModel):
    """A head with labels and nothing else of its own among the arguments of `forward`."""

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
    ) -> Any:
        """Logits, and with labels their loss, as `_answer` of the class describes them."""
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
        return self._answer(inputs, labels, return_dict)

    def _answer(self, inputs: Inputs, labels: Tensor | None, return_dict: bool | None) -> Any:
        raise TypeError(f"{type(self).__name__} answers nothing")


class ForSequenceClassification(LabelledModel):
    """A class, or `num_labels` numbers, for each sequence, from its pooled first token."""

    heads = ("classifier",)

    def _build_heads(self) -> None:
        self.dropout = self._dropout()
        self.classifier = self._linear("classifier", self.num_labels)

    def _answer(
        self, inputs: Inputs, labels: Tensor | None, return_dict: bool | None
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits [b, c], and with labels the loss that `config.problem_type` names.

        Args:
            labels: i64[b] of a single label; float[b, c] of several labels; float[b] or
                float[b, c] of a regression. Where `config.problem_type` is None, the first labels
                decide it: a regression with one output, a single label with whole numbers,
                several labels otherwise.
        """
        if labels is not None and self.config.problem_type is None:
            # Here and not in the head, so that all stages have the same configuration.
            self.config.problem_type = problem_type(self.num_labels, labels)

        def head(top: Top) -> dict[str, Tensor | None]:
            logits = self.classifier(self.dropout(top.pooler_output))  # [b, c]
            return {
                "loss": sequence_loss(logits, labels, self.config.problem_type),
                "logits": logits,
            }

        return self.bert.answer(inputs, head, SequenceClassifierOutput, return_dict)


class ForMultipleChoice(LabelledModel):
    """One score for each of several continuations of a text, from its pooled first token."""

    heads = ("classifier",)

    def _build_heads(self) -> None:
        self.dropout = self._dropout()
        self.classifier = self._linear("classifier", 1)

    def _answer(
        self, inputs: Inputs, labels: Tensor | None, return_dict: bool | None
    ) -> MultipleChoiceModelOutput | tuple[Tensor, ...]:
        """Logits [b, n], and with labels their mean cross entropy.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: [b, n, s].
            inputs_embeds: [b, n, s, h].
            labels: i64[b], the right choice.
        """
        choices = inputs.given.size(1)
        inputs = replace(
            inputs,
            input_ids=_rows(inputs.input_ids),
            attention_mask=_rows(inputs.attention_mask),
            token_type_ids=_rows(inputs.token_type_ids),
            position_ids=_rows(inputs.position_ids),
            inputs_embeds=_rows(inputs.inputs_embeds, kept=2),
        )

        def head(top: Top) -> dict[str, Tensor | None]:
            logits = self.classifier(self.dropout(top.pooler_output))  # [b * n, 1]
            logits = logits.view(-1, choices)  # [b, n]
            return {"loss": label_loss(logits, labels), "logits": logits}

        return self.bert.answer(inputs, head, MultipleChoiceModelOutput, return_dict)


def _rows(tensor: Tensor | None, kept: int = 1) -> Tensor | None:
    """Every choice a row of the batch: all dims but the last `kept` become one."""
    return None if tensor is None else tensor.reshape(-1, *tensor.shape[-kept:])


class ForTokenClassification(LabelledModel):
    """A label for each token."""

    heads = ("classifier",)
    reads_pooled = False

    def _build_heads(self) -> None:
        self.dropout = self._dropout()
        self.classifier = self._linear("classifier", self.num_labels)

    def _answer(
        self, inputs: Inputs, labels: Tensor | None, return_dict: bool | None
    ) -> TokenClassifierOutput | tuple[Tensor, ...]:
        """Logits [b, s, c], and with labels their mean cross entropy.

        Args:
            labels: i64[b, s]; a label of -100 is left out.
        """

        def head(top: Top) -> dict[str, Tensor | None]:
            logits = self.classifier(self.dropout(top.last_hidden_state))  # [b, s, c]
            return {"loss": label_loss(logits, labels), "logits": logits}

        return self.bert.answer(inputs, head, TokenClassifierOutput, return_dict)


class ForQuestionAnswering(HeadedModel):
    """Where in the text the answer starts, and where it ends."""

    heads = ("qa",)
    reads_pooled = False

    def __init__(
        self, config: BertFamilyConfig, *, parallel_state: ParallelState | None = None
    ) -> None:
        if config.num_labels != 2:
            raise ConfigError(
                f"num_labels: found {config.num_labels}, and question answering has 2, one for "
                "the start and one for the end of the answer"
            )
        super().__init__(config, parallel_state=parallel_state)

    def _build_heads(self) -> None:
        self.qa_outputs = self._linear("qa_outputs", self.num_labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Tensor, ...]:
        """Start and end logits [b, s] each, and with both positions the mean of their losses.

        Args:
            start_positions, end_positions: i64[b]; one behind the sequence is left out.
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
            start, end = self.qa_outputs(top.last_hidden_state).unbind(-1)  # [b, s] each
            start, end = start.contiguous(), end.contiguous()
            loss = span_loss(start, end, start_positions, end_positions)
            return {"loss": loss, "start_logits": start, "end_logits": end}

        return self.bert.answer(inputs, head, QuestionAnsweringModelOutput, return_dict)
