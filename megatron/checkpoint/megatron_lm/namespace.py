"""Our configuration as the arguments that Megatron-LM saves, and what it has no arguments for.

The names are those of all releases together, so that an old one finds what it compares with its own
command line, the last ones what `--use-checkpoint-args` takes over, and the converters of
`transformers` what they read.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron.checkpoint.megatron_lm.arguments import SAME
from megatron.config import ModelConfig

_TOKENIZER_TYPES = {
    "bert": "BertWordPieceLowerCase",
    "gpt": "GPT2BPETokenizer",
    "t5": "BertWordPieceLowerCase",
}

# (activation of the MLP, activation of BERT's head) -> arguments; other models have no such head.
_ACTIVATIONS: dict[tuple[str, str], dict[str, bool]] = {
    ("gelu", "gelu"): {},
    ("gelu_tanh", "gelu_tanh"): {"openai_gelu": True},
    ("gelu_tanh", "gelu"): {"bias_gelu_fusion": True},
    ("relu2", "gelu"): {"squared_relu": True},
}


@dataclass(frozen=True)
class Split:
    """How a checkpoint is cut: over tensor and pipeline ranks, and these into virtual stages.

    split_rank: the pipeline rank at which a T5's decoder begins; None where there is one rank.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    split_rank: int | None = None


def inexpressible(model: ModelConfig, version: int) -> Iterator[str]:
    """A line for each field of the model that no Megatron-LM checkpoint of `version` can have."""
    kind = model.model_type
    if model.norm_position != "pre":
        yield f"--norm-position {model.norm_position}: Megatron-LM knows pre"
    if model.position_embedding_type not in ("learned_absolute", "rope"):
        yield (
            f"--position-embedding-type {model.position_embedding_type}: Megatron-LM knows "
            "learned_absolute and rope"
        )
    scale = model.head_size**-0.5
    if model.attention_scale not in (None, scale):
        yield f"--attention-scale {model.attention_scale}: Megatron-LM knows {scale}"
    if model.logit_scale != 1.0 and kind != "bert":
        yield f"--logit-scale {model.logit_scale}: Megatron-LM knows 1"
    if model.geglu:
        yield "--geglu: Megatron-LM knows --swiglu"
    if model.untie_embeddings_and_output_weights and kind != "gpt":
        yield f"--untie-embeddings-and-output-weights: Megatron-LM knows it of gpt, not of {kind}"
    if _activation_arguments(model) is None:
        yield _activation_problem(model)
    yield from _inexpressible_groups(model, version)


def _inexpressible_groups(model: ModelConfig, version: int) -> Iterator[str]:
    if model.key_value_heads == model.num_attention_heads:
        return
    groups = f"--num-query-groups {model.num_query_groups}"
    if version < 2:
        yield f"{groups}: checkpoint version {version} knows one group per head, 2 and 3 any number"
    if model.model_type == "t5":
        yield f"{groups}: Megatron-LM knows one group per head where there is cross attention"


def _activation_arguments(model: ModelConfig) -> dict[str, bool] | None:
    head = model.lm_head_activation if model.model_type == "bert" else None
    if model.is_gated:
        return {} if head in (None, "gelu") else None
    found = next(
        (
            arguments
            for (mlp, its_head), arguments in _ACTIVATIONS.items()
            if mlp == model.activation and head in (None, its_head)
        ),
        None,
    )
    # Without biases nothing is fused with them, and the MLP's GELU is the other one.
    is_possible = found is None or "bias_gelu_fusion" not in found or not model.disable_bias_linear
    return found if is_possible else None


def _activation_problem(model: ModelConfig) -> str:
    found = f"--activation {model.activation}"
    possible = "gelu, gelu_tanh and relu2"
    if model.model_type == "bert":
        found = f"{'--swiglu' if model.is_gated else found} with --head-activation "
        found += model.lm_head_activation
        possible = "gelu with gelu, gelu_tanh with either (with gelu where there are biases), "
        possible += "relu2 or --swiglu with gelu"
    return f"{found}: Megatron-LM knows {possible}"


def arguments_of(
    model: ModelConfig,
    split: Split,
    *,
    padded_vocab: int,
    iteration: int,
    tokenizer_type: str | None,
    binary_head: bool,
) -> Namespace:
    """The arguments of a model that `inexpressible` has nothing against."""
    values: dict[str, Any] = {name: getattr(model, name) for name in SAME}
    values |= {
        "ffn_hidden_size": model.ffn_size,
        "kv_channels": model.head_size,
        "norm_epsilon": model.layernorm_epsilon,
        "add_bias_linear": not model.disable_bias_linear,
        "group_query_attention": model.key_value_heads != model.num_attention_heads,
        "num_query_groups": model.key_value_heads,
        "vocab_size": model.vocab_size,
        "orig_vocab_size": model.vocab_size,  # as transformers' converters call it
        "padded_vocab_size": padded_vocab,
        "tokenizer_type": tokenizer_type or _TOKENIZER_TYPES[model.model_type],
        "encoder_num_layers": model.num_layers,
        "decoder_num_layers": model.decoder_layers if model.model_type == "t5" else None,
        "seq_length": model.max_position_embeddings,
        "encoder_seq_length": model.max_position_embeddings,
        "bert_binary_head": binary_head,
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "onnx_safe": None,
        "iteration": iteration,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    if split.virtual > 1:
        layers = model.num_layers // (split.pipeline * split.virtual)
        values["num_layers_per_virtual_pipeline_stage"] = layers
    return Namespace(
        **values | _activation_flags(model) | _positions(model) | _precision(model) | _ranks(split)
    )


def _activation_flags(model: ModelConfig) -> dict[str, bool]:
    off = dict.fromkeys(("openai_gelu", "bias_gelu_fusion", "squared_relu"), False)
    return off | (_activation_arguments(model) or {})


def _positions(model: ModelConfig) -> dict[str, Any]:
    is_rotary = model.position_embedding_type == "rope"
    return {
        "position_embedding_type": model.position_embedding_type,
        "add_position_embedding": not is_rotary,
        "use_rotary_position_embeddings": is_rotary,
        "rotary_percent": model.rotary_percent,
        "rotary_base": model.rotary_base,
    }


def _precision(model: ModelConfig) -> dict[str, Any]:
    # Megatron-LM has no double precision: what is stored so is loaded as float32.
    dtype = torch.float32 if model.fp64 else getattr(torch, model.dtype)
    return {"fp16": model.fp16, "bf16": model.bf16, "params_dtype": dtype}


def _ranks(split: Split) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": split.tensor,
        "pipeline_model_parallel_size": split.pipeline,
        "virtual_pipeline_model_parallel_size": split.virtual if split.virtual > 1 else None,
        "pipeline_model_parallel_split_rank": split.split_rank,
        "data_parallel_size": 1,
        "world_size": split.tensor * split.pipeline,
        "rank": 0,
        "use_distributed_optimizer": False,
    }
