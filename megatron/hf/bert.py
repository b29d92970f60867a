"""The original BERT: a LayerNorm behind each sum of the residual stream (arXiv 1810.04805).

The classes and their names, arguments and outputs are those that `transformers` documents up to
release 4.34. Each is a head of `megatron.hf.language_heads` or `task_heads` on a `BertModel`, whose
layers are those of MegatronBERT with the norm in the other place.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from megatron.hf.backbone import Backbone
from megatron.hf.configuration import BertConfig
from megatron.hf.language_heads import (
    ForCausalLM,
    ForMaskedLM,
    ForNextSentencePrediction,
    ForPreTraining,
    PastKeyValues,
)
from megatron.hf.outputs import BertForPreTrainingOutput
from megatron.hf.pretrained import PreTrainedModel
from megatron.hf.task_heads import (
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)


class BertPreTrainedModel(PreTrainedModel):
    """What all classes of the family share: configuration, loading, saving, initial values."""

    config_class = BertConfig
    base_model_prefix = "bert"


class BertModel(Backbone, BertPreTrainedModel):
    """The network without a head: hidden states, and the pooled first token."""


class _OnBert(BertPreTrainedModel):
    backbone_class: ClassVar[type[Backbone]] = BertModel


class BertForPreTraining(ForPreTraining, _OnBert):
    """Both tasks of pretraining: masked tokens and the next sentence."""

    output_class = BertForPreTrainingOutput


class BertForMaskedLM(ForMaskedLM, _OnBert):
    """Masked tokens."""


class BertLMHeadModel(ForCausalLM, _OnBert):
    """The next token, with `is_decoder=True`."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: PastKeyValues | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        **model_kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward: with a cache, the last token alone."""
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values, attention_mask)
        return inputs | {"use_cache": use_cache}


class BertForNextSentencePrediction(ForNextSentencePrediction, _OnBert):
    """Whether the second sentence follows the first."""


class BertForSequenceClassification(ForSequenceClassification, _OnBert):
    """A class, several labels or numbers for each sequence."""


class BertForMultipleChoice(ForMultipleChoice, _OnBert):
    """The best of several continuations."""


class BertForTokenClassification(ForTokenClassification, _OnBert):
    """A label for each token."""


class BertForQuestionAnswering(ForQuestionAnswering, _OnBert):
    """The span of the text that answers a question."""
