"""MegatronBERT: BERT with a LayerNorm in front of each block, as Megatron-LM trains it.

arXiv 1909.08053. The classes and their names, arguments and outputs are those that `transformers`
documents up to release 4.34. Each is a head of `megatron.hf.language_heads` or `task_heads` on a
`MegatronBertModel`.
"""

from __future__ import annotations

from typing import ClassVar

from megatron.errors import ConfigError
from megatron.hf.backbone import Backbone
from megatron.hf.configuration import MegatronBertConfig
from megatron.hf.language_heads import (
    ForCausalLM,
    ForMaskedLM,
    ForNextSentencePrediction,
    ForPreTraining,
)
from megatron.hf.outputs import MegatronBertForPreTrainingOutput
from megatron.hf.pretrained import PreTrainedModel
from megatron.hf.task_heads import (
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from megatron.mpu import ParallelState


class MegatronBertPreTrainedModel(PreTrainedModel):
    """What all classes of the family share: configuration, loading, saving, initial values."""

    config_class = MegatronBertConfig
    base_model_prefix = "bert"


class MegatronBertModel(Backbone, MegatronBertPreTrainedModel):
    """The network without a head: hidden states, and the pooled first token."""

    cross_distances = True


class _OnMegatronBert(MegatronBertPreTrainedModel):
    backbone_class: ClassVar[type[Backbone]] = MegatronBertModel


class MegatronBertForPreTraining(ForPreTraining, _OnMegatronBert):
    """Both tasks of pretraining: masked tokens and the next sentence."""

    output_class = MegatronBertForPreTrainingOutput

    def __init__(
        self,
        config: MegatronBertConfig,
        add_binary_head: bool = True,
        *,
        parallel_state: ParallelState | None = None,
    ) -> None:
        if not add_binary_head:
            raise ConfigError(
                "add_binary_head=False: MegatronBertForMaskedLM is the model without that head"
            )
        super().__init__(config, parallel_state=parallel_state)


class MegatronBertForMaskedLM(ForMaskedLM, _OnMegatronBert):
    """Masked tokens."""


class MegatronBertForCausalLM(ForCausalLM, _OnMegatronBert):
    """The next token, with `is_decoder=True`."""


class MegatronBertForNextSentencePrediction(ForNextSentencePrediction, _OnMegatronBert):
    """Whether the second sentence follows the first."""


class MegatronBertForSequenceClassification(ForSequenceClassification, _OnMegatronBert):
    """A class, several labels or numbers for each sequence."""


class MegatronBertForMultipleChoice(ForMultipleChoice, _OnMegatronBert):
    """The best of several continuations."""


class MegatronBertForTokenClassification(ForTokenClassification, _OnMegatronBert):
    """A label for each token."""


class MegatronBertForQuestionAnswering(ForQuestionAnswering, _OnMegatronBert):
    """The span of the text that answers a question."""
