"""The networks.

Read in this order: ``transformer`` (a layer), ``language_model`` (what is below the heads), and one
of ``bert_model``, ``gpt_model`` and ``t5_model``.
"""

from megatron.model.attention import ParallelAttention
from megatron.model.bert_model import BertModel, bert_loss_sums, build_bert
from megatron.model.embedding import Embedding
from megatron.model.enums import AttnMaskType, LayerType, ModelType
from megatron.model.gpt_model import GPTModel, build_gpt
from megatron.model.initial import init_method_normal, scaled_init_method_normal
from megatron.model.language_model import (
    Pooler,
    TransformerLanguageModel,
    get_language_model,
)
from megatron.model.mlp import ParallelMLP
from megatron.model.module import (
    Float16Module,
    MegatronModule,
    conversion_helper,
    float16_to_fp32,
    fp32_to_float16,
    parameter_dtype,
    stream_dtype,
)
from megatron.model.t5_model import T5Model, build_t5
from megatron.model.transformer import ParallelTransformer, ParallelTransformerLayer

__all__ = [
    "AttnMaskType",
    "BertModel",
    "Embedding",
    "Float16Module",
    "GPTModel",
    "LayerType",
    "MegatronModule",
    "ModelType",
    "ParallelAttention",
    "ParallelMLP",
    "ParallelTransformer",
    "ParallelTransformerLayer",
    "Pooler",
    "T5Model",
    "TransformerLanguageModel",
    "bert_loss_sums",
    "build_bert",
    "build_gpt",
    "build_t5",
    "conversion_helper",
    "float16_to_fp32",
    "fp32_to_float16",
    "get_language_model",
    "init_method_normal",
    "parameter_dtype",
    "scaled_init_method_normal",
    "stream_dtype",
]
