"""The MegatronBERT family, and the original BERT, in the conventions of `transformers`.

Classes, arguments, outputs, file formats and names are those that `transformers` documents up to
release 4.34; the networks are the ones of `megatron.model`. So the same classes run on one process
and, started by `torchrun`, on several that share the model. Read `docs/huggingface.md` first.

`transformers` itself is needed only for its tokenizers, which are passed on as they are.
"""

from typing import Any

from megatron.hf.backends import TOKENIZERS, requires_backends, tokenizer_class
from megatron.hf.bert import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    BertPreTrainedModel,
)
from megatron.hf.configuration import BertConfig, MegatronBertConfig, PretrainedConfig
from megatron.hf.fine_tuning import FineTuner
from megatron.hf.megatron_bert import (
    MegatronBertForCausalLM,
    MegatronBertForMaskedLM,
    MegatronBertForMultipleChoice,
    MegatronBertForNextSentencePrediction,
    MegatronBertForPreTraining,
    MegatronBertForQuestionAnswering,
    MegatronBertForSequenceClassification,
    MegatronBertForTokenClassification,
    MegatronBertModel,
    MegatronBertPreTrainedModel,
)
from megatron.hf.outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    BertForPreTrainingOutput,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MegatronBertForPreTrainingOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from megatron.hf.parallel import parallel_state
from megatron.hf.pretrained import PreTrainedModel


def __getattr__(name: str) -> Any:
    """The tokenizers, which import `transformers` when they are first asked for."""
    if name in TOKENIZERS:
        return tokenizer_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AutoTokenizer",
    "BaseModelOutputWithPastAndCrossAttentions",
    "BaseModelOutputWithPoolingAndCrossAttentions",
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForPreTrainingOutput",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
    "BertPreTrainedModel",
    "BertTokenizer",
    "BertTokenizerFast",
    "CausalLMOutputWithCrossAttentions",
    "FineTuner",
    "MaskedLMOutput",
    "MegatronBertConfig",
    "MegatronBertForCausalLM",
    "MegatronBertForMaskedLM",
    "MegatronBertForMultipleChoice",
    "MegatronBertForNextSentencePrediction",
    "MegatronBertForPreTraining",
    "MegatronBertForPreTrainingOutput",
    "MegatronBertForQuestionAnswering",
    "MegatronBertForSequenceClassification",
    "MegatronBertForTokenClassification",
    "MegatronBertModel",
    "MegatronBertPreTrainedModel",
    "ModelOutput",
    "MultipleChoiceModelOutput",
    "NextSentencePredictorOutput",
    "PreTrainedModel",
    "PretrainedConfig",
    "QuestionAnsweringModelOutput",
    "SequenceClassifierOutput",
    "TokenClassifierOutput",
    "parallel_state",
    "requires_backends",
]
