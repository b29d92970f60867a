"""What every class with a head has in common: the backbone below, the heads' modules on top.

A class of the family is a backbone and a few linear layers. Its `forward` says with `Inputs` what
the backbone is given and with a function what is made of the backbone's output; everything about
stages and ranks is in `Backbone.answer`. The heads are built on the last pipeline stage alone, and
all tensor ranks of that stage hold and compute them whole, but for the scores of the vocabulary.

Letters: b batch, s sequence, h hidden, c labels, v vocabulary.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.hf.backbone import Backbone
from megatron.hf.configuration import BertFamilyConfig
from megatron.hf.pretrained import PreTrainedModel
from megatron.model.linear import WholeLinear
from megatron.mpu import ParallelState

logger = logging.getLogger(__name__)


class HeadedModel(PreTrainedModel):
    """The backbone `self.bert` and, on the last pipeline stage, the heads of the class on top."""

    backbone_class: ClassVar[type[Backbone]]
    reads_pooled: ClassVar[bool] = True  # whether a head reads the pooled first token

    def __init__(
        self, config: BertFamilyConfig, *, parallel_state: ParallelState | None = None
    ) -> None:
        super().__init__(config, parallel_state=parallel_state)
        self.num_labels = config.num_labels
        self.bert = self.backbone_class(
            config, add_pooling_layer=self.reads_pooled, parallel_state=self.state
        )
        if self.stage.is_last:
            self._build_heads()
        self.post_init()

    def _build_heads(self) -> None:
        """Make the modules of the heads; called on the last stage alone."""
        raise TypeError(f"{type(self).__name__} has no head")

    def _linear(self, name: str, outputs: int) -> WholeLinear:
        """A linear layer of a head, whole on every tensor rank."""
        return WholeLinear(self.native_config, self.state, name, outputs)

    def _dropout(self) -> nn.Dropout:
        """The dropout in front of a classifier.

        It draws from the default generator, which is the same on all tensor ranks.
        """
        probability = getattr(self.config, "classifier_dropout", None)
        return nn.Dropout(self.config.hidden_dropout_prob if probability is None else probability)


def label_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Mean cross entropy of [..., c] logits and i64[...] labels; a label of -100 is left out."""
    if labels is None:
        return None
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1))


def next_token_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Mean cross entropy of [b, s, v] logits with the label one position further on."""
    return None if labels is None else label_loss(logits[:, :-1], labels[:, 1:])


def problem_type(num_labels: int, labels: Tensor) -> str:
    """The kind of problem that the labels of sequences speak of, where nobody has said it.

    One output is a number to come close to, whole numbers are classes, and several real numbers
    are a probability each.
    """
    if num_labels == 1:
        return "regression"
    if labels.dtype in (torch.int64, torch.int32):
        return "single_label_classification"
    return "multi_label_classification"


def sequence_loss(logits: Tensor, labels: Tensor | None, problem: str | None) -> Tensor | None:
    """The loss of [b, c] logits: mean square, cross entropy, or binary cross entropy of each."""
    if labels is None:
        return None
    if problem == "regression":
        if logits.size(-1) == 1:
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        return F.mse_loss(logits, labels)
    if problem == "single_label_classification":
        return label_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def span_loss(
    start_logits: Tensor, end_logits: Tensor, starts: Tensor | None, ends: Tensor | None
) -> Tensor | None:
    """Mean of the cross entropies of where a span starts and ends.

    Args:
        start_logits, end_logits: [b, s].
        starts, ends: i64[b] or i64[b, 1]. One that lies behind the sequence, whose answer was cut
            off, is left out; a negative one counts as 0.
    """
    if starts is None or ends is None:
        return None
    length = start_logits.size(1)

    def loss(logits: Tensor, positions: Tensor) -> Tensor:
        if positions.dim() > 1:
            positions = positions.squeeze(-1)
        return F.cross_entropy(logits, positions.clamp(0, length), ignore_index=length)

    return (loss(start_logits, starts) + loss(end_logits, ends)) / 2
