"""The loss of every head as sums and counts, of which a mean over a whole step is made.

A head's own loss is a mean over the labels of its batch. A mean of such means depends on how a step
is cut into micro-batches, as soon as these do not have equally many labels that count. Here a loss
is a few terms, each with its sum and with the number of labels that it is a mean over, which is
known before anything is computed.

Letters: b batch, s sequence, c classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.errors import DataError
from megatron.hf.configuration import PretrainedConfig
from megatron.hf.heads import HeadedModel, problem_type
from megatron.hf.language_heads import ForCausalLM, ForPreTraining
from megatron.hf.outputs import ModelOutput
from megatron.hf.task_heads import ForQuestionAnswering, ForSequenceClassification

Batch = Mapping[str, Tensor]

LABELS = frozenset({"labels", "next_sentence_label", "start_positions", "end_positions"})
NOT_COUNTED = -100


@dataclass(frozen=True)
class Term:
    """One mean over labels.

    Attributes:
        logits: the field of the model's output that is compared with the labels.
        labels: as `loss` takes them.
        loss: (logits, labels) -> the sum over the labels that count.
        count: how many these are, a scalar.
        factor: what the mean is multiplied by.
    """

    logits: str
    labels: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    count: Tensor
    factor: float = 1.0

    def share(self, output: ModelOutput, total: Tensor) -> Tensor:
        """What this micro-batch adds to a mean over `total` labels, in float32 or float64."""
        logits = output[self.logits]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.loss(logits, self.labels) * (self.factor / total)


def loss_terms(model: HeadedModel, batch: Batch) -> list[Term]:
    """The terms of the loss that the model's class documents.

    Raises:
        DataError: the batch lacks the labels.
    """
    match model:
        case ForPreTraining():
            return [
                _of_classes("prediction_logits", _given(batch, "labels")),
                _of_classes("seq_relationship_logits", _given(batch, "next_sentence_label")),
            ]
        case ForQuestionAnswering():
            # An end that lies behind the sequence does not count.
            length = sequence_shape(batch)[1]
            return [
                replace(
                    _of_classes(
                        f"{end}_logits",
                        _given(batch, f"{end}_positions").clamp(0, length),
                        not_counted=length,
                    ),
                    factor=0.5,
                )
                for end in ("start", "end")
            ]
        case ForCausalLM():
            # A position is compared with the label behind it, and the last with none.
            following = F.pad(_given(batch, "labels")[:, 1:], (0, 1), value=NOT_COUNTED)
            return [_of_classes("logits", following)]
        case ForSequenceClassification():
            return [_of_sequences(model.config, _given(batch, "labels"))]
    return [_of_classes("logits", _given(batch, "labels"))]


def sequence_shape(batch: Batch) -> tuple[int, int]:
    """(sequences, s); of several choices each is a sequence.

    Raises:
        DataError: the batch has neither ids nor embeddings.
    """
    if "input_ids" in batch:
        *rows, length = batch["input_ids"].shape
    else:
        *rows, length, _ = _given(batch, "inputs_embeds").shape
    return torch.Size(rows).numel(), length


def _given(batch: Batch, name: str) -> Tensor:
    if batch.get(name) is None:
        raise DataError(f"a batch has no {name}, found {', '.join(batch) or 'nothing'}")
    return batch[name]


def _of_classes(logits: str, labels: Tensor, not_counted: int = NOT_COUNTED) -> Term:
    """Cross entropy of [..., c] logits and i64[...] labels."""
    loss = partial(_cross_entropy, not_counted=not_counted)
    return Term(logits, labels.reshape(-1), loss, (labels != not_counted).sum())


def _of_sequences(config: PretrainedConfig, labels: Tensor) -> Term:
    """The loss of a sequence's classes or numbers, of which every one counts."""
    if config.problem_type is None:
        # As in `forward`, which is not given the labels: the first ones decide.
        config.problem_type = problem_type(config.num_labels, labels)
    if config.problem_type == "single_label_classification":
        return _of_classes("logits", labels)
    loss = _squares if config.problem_type == "regression" else _binary_cross_entropy
    return Term("logits", labels, loss, torch.tensor(labels.numel(), device=labels.device))


def _cross_entropy(logits: Tensor, labels: Tensor, not_counted: int) -> Tensor:
    rows = logits.reshape(labels.numel(), -1)
    return F.cross_entropy(rows, labels, ignore_index=not_counted, reduction="sum")


def _squares(logits: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype), reduction="sum")


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
