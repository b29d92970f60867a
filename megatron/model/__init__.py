"""The networks."""

from megatron.model.bert_model import BertModel, bert_loss_sums, build_bert
from megatron.model.language_model import (
    Embedding,
    Pooler,
    TransformerLanguageModel,
    get_language_model,
)
from megatron.model.module import (
    Float16Module,
    MegatronModule,
    conversion_helper,
    float16_to_fp32,
    fp32_to_float16,
    parameter_dtype,
)
from megatron.model.transformer import (
    ParallelAttention,
    ParallelMLP,
    ParallelTransformer,
    ParallelTransformerLayer,
    init_method_normal,
    scaled_init_method_normal,
)

__all__ = [
    "BertModel",
    "Embedding",
    "Float16Module",
    "MegatronModule",
    "ParallelAttention",
    "ParallelMLP",
    "ParallelTransformer",
    "ParallelTransformerLayer",
    "Pooler",
    "TransformerLanguageModel",
    "bert_loss_sums",
    "build_bert",
    "conversion_helper",
    "float16_to_fp32",
    "fp32_to_float16",
    "get_language_model",
    "init_method_normal",
    "parameter_dtype",
    "scaled_init_method_normal",
]
