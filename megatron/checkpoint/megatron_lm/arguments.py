"""The arguments that Megatron-LM saves in a checkpoint, read as our configuration.

A checkpoint's `args` is the `argparse.Namespace` of the run that wrote it. Each release has other
arguments, and the first checkpoints have none. What they do not say is taken from the tensors where
those can tell, and is assumed where they cannot; every assumption is noted in a line.

What an argument turns on and no model of ours does is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.megatron_lm.names import (
    BINARY_HEAD,
    LM_HEAD,
    OUTPUT_LAYER,
    POOLER,
    POSITION_EMBEDDINGS,
    TOKENTYPE_EMBEDDINGS,
    WORD_EMBEDDINGS,
    Shape,
    layers_of,
)
from megatron.config import ModelConfig
from megatron.config.flags import flags_of
from megatron.errors import CheckpointError, ConfigError

# Arguments with our name and meaning.
SAME = (
    "apply_residual_connection_post_layernorm",
    "attention_dropout",
    "attention_softmax_in_fp32",
    "ffn_hidden_size",
    "fp32_residual_connection",
    "hidden_dropout",
    "hidden_size",
    "init_method_std",
    "init_method_xavier_uniform",
    "kv_channels",
    "layernorm_epsilon",
    "make_vocab_size_divisible_by",
    "max_position_embeddings",
    "normalization",
    "num_attention_heads",
    "num_layers",
    "swiglu",
    "untie_embeddings_and_output_weights",
)
TOKENIZER_FILES = ("vocab_file", "merge_file", "tokenizer_model")

# Arguments that change what a model computes in a way that ours does not know.
_REFUSED = {
    "apply_layernorm_1p": "norms of the weight itself",
    "num_experts": "an MLP without experts",
    "rotary_interleaved": "rotary positions that pair a head's first half with its second",
    "rotary_seq_len_interpolation_factor": "rotary positions that are not interpolated",
    "retro_add_retriever": "a model without retrieval",
    "qk_layernorm": "queries and keys that are not normalised",
}
# What differs between releases and tensors do not show.
_ASSUMED = (
    "layernorm_epsilon",
    "apply_residual_connection_post_layernorm",
    "attention_dropout",
    "hidden_dropout",
)
_PRECISIONS = {
    torch.float16: {"fp16": True},
    torch.bfloat16: {"bf16": True},
    torch.float64: {"fp64": True},
    torch.float32: {},
}
_LAYER = "language_model.encoder.layers.0"
# Heads by layers and width, of the models of 345M parameters that were released without arguments.
_RELEASED_HEADS = {(24, 1024): 16}


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds: arguments, without those that are None, and tensors.

    shapes: by our names, over all tensor ranks, padding included; dtype: of the weights.
    """

    where: str
    arguments: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    dtype: torch.dtype

    @property
    def model_type(self) -> str:
        """ "t5", "bert" or "gpt", as the tensors show, and for a bare stack the tokenizer."""
        if layers_of("decoder", self.shapes):
            return "t5"
        of_bert = (POOLER, LM_HEAD + ".dense", BINARY_HEAD, TOKENTYPE_EMBEDDINGS)
        if any(name.startswith(of_bert) for name in self.shapes):
            return "bert"
        return "bert" if "Bert" in str(self.arguments.get("tokenizer_type")) else "gpt"


def given_arguments(args: Any, where: str) -> dict[str, Any]:
    """The arguments of a checkpoint that are not None; none where it has no `args`.

    Raises:
        CheckpointError: `args` is no namespace.
    """
    if args is None:
        return {}
    if not hasattr(args, "__dict__"):
        raise CheckpointError(f"{where}: args is {type(args).__name__}, expected a namespace")
    return {name: value for name, value in vars(args).items() if value is not None}


def model_config(
    stored: Stored, *, heads: int | None = None, vocab_size: int | None = None
) -> tuple[ModelConfig, list[str]]:
    """The configuration of a checkpoint's model, and a line for each thing that was assumed.

    heads, vocab_size: what the checkpoint may not say; see `open_megatron`.

    Raises:
        CheckpointError: the number of heads is not known, or ours cannot be such a model.
    """
    problems = list(_refusals(stored.arguments))
    if problems:
        raise CheckpointError(f"{stored.where}: {problem}" for problem in problems)
    values: dict[str, Any] = {"num_attention_heads": _heads(stored, heads)}
    found = _from_tensors(stored, values["num_attention_heads"])
    values |= found | _from_arguments(stored)
    for stack in ("num_layers", "decoder_num_layers"):
        if values[stack] != found[stack]:
            raise CheckpointError(
                f"{stored.where}: args say {stack} {values[stack]}, found {found[stack]} layers"
            )
    if values["untie_embeddings_and_output_weights"] and stored.model_type != "gpt":
        raise CheckpointError(
            f"{stored.where}: args.untie_embeddings_and_output_weights of a {stored.model_type}, "
            "what can be read is a gpt of this kind"
        )
    values |= _activations(stored, bool(values["swiglu"]))
    values["vocab_size"] = _vocab_size(stored, vocab_size)
    assumptions = _assumptions(stored, values, heads, vocab_size)
    return _checked(values, stored.where), list(assumptions)


def _refusals(given: Mapping[str, Any]) -> Iterator[str]:
    for name, possible in _REFUSED.items():
        if given.get(name):
            yield f"args.{name} is {given[name]}, what can be read is {possible}"
    if given.get("openai_gelu") and given.get("swiglu"):
        yield "args.openai_gelu and args.swiglu: expected one of them"
    position = given.get("position_embedding_type", "learned_absolute")
    if position not in ("learned_absolute", "rope"):
        yield (
            f"args.position_embedding_type is {position}, what can be read is learned_absolute "
            "or rope"
        )


def _heads(stored: Stored, heads: int | None) -> int:
    found = stored.arguments.get("num_attention_heads", heads)
    if found is None and not stored.arguments:
        width = stored.shapes.get(WORD_EMBEDDINGS, (0, 0))[-1]
        found = _RELEASED_HEADS.get((layers_of("encoder", stored.shapes), width))
    if found is None:
        raise CheckpointError(
            f"{stored.where} does not say the number of attention heads, which no tensor shows: "
            "state it with --num-attention-heads"
        )
    if heads not in (None, found):
        raise CheckpointError(
            f"--num-attention-heads {heads}, but {stored.where} says {found} in its args"
        )
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise CheckpointError(f"{stored.where}: args.num_attention_heads is {found!r}")
    return found


def _from_tensors(stored: Stored, heads: int) -> dict[str, Any]:
    """The fields that shapes and names of tensors show."""
    shapes = stored.shapes
    try:
        width, ffn = (
            shapes[f"{_LAYER}.{row}.weight"][1]
            for row in ("self_attention.dense", "mlp.dense_4h_to_h")
        )
        values = {
            "model_type": stored.model_type,
            "num_layers": layers_of("encoder", shapes),
            "decoder_num_layers": layers_of("decoder", shapes) or None,
            "hidden_size": shapes[WORD_EMBEDDINGS][1],
            "kv_channels": width // heads,
            "ffn_hidden_size": ffn,
            "swiglu": shapes[f"{_LAYER}.mlp.dense_h_to_4h.weight"][0] == 2 * ffn,
        }
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{stored.where} holds no {error}, or not as a matrix") from error
    if POSITION_EMBEDDINGS in shapes:
        values["max_position_embeddings"] = shapes[POSITION_EMBEDDINGS][0]
    has_norm_bias = f"{_LAYER}.input_layernorm.bias" in shapes
    if stored.dtype not in _PRECISIONS:
        raise CheckpointError(f"{stored.where}: its weights are {stored.dtype}, no floating type")
    if stored.model_type == "bert":
        values["num_tokentypes"] = shapes.get(TOKENTYPE_EMBEDDINGS, (0,))[0]
        values["bert_no_binary_head"] = f"{BINARY_HEAD}.weight" not in shapes
    return (
        values
        | _PRECISIONS[stored.dtype]
        | {
            "normalization": "LayerNorm" if has_norm_bias else "RMSNorm",
            "disable_bias_linear": f"{_LAYER}.self_attention.dense.bias" not in shapes,
            "untie_embeddings_and_output_weights": OUTPUT_LAYER in shapes,
        }
    )


def _from_arguments(stored: Stored) -> dict[str, Any]:
    """The fields that the arguments state."""
    given, kind = stored.arguments, stored.model_type
    values = {name: given[name] for name in SAME if name in given}
    if "norm_epsilon" in given:  # its name in the last releases
        values["layernorm_epsilon"] = given["norm_epsilon"]
    if "add_bias_linear" in given:
        values["disable_bias_linear"] = not given["add_bias_linear"]
    if given.get("group_query_attention"):
        values["num_query_groups"] = given.get("num_query_groups")
    if kind == "t5":
        said = given.get("decoder_num_layers", given.get("num_layers"))
        if said is not None:
            values["decoder_num_layers"] = said
    if given.get("use_rotary_position_embeddings"):
        values["position_embedding_type"] = "rope"
    elif "position_embedding_type" in given:
        values["position_embedding_type"] = given["position_embedding_type"]
    if values.get("position_embedding_type") == "rope":
        rotary = ("rotary_base", "rotary_percent")
        values |= {name: given[name] for name in rotary if name in given}
    return values


def _activations(stored: Stored, gated: bool) -> dict[str, Any]:
    """The activation of the MLP, and of BERT's head where that is another."""
    given, kind = stored.arguments, stored.model_type
    if not given and not gated:
        # The first GPT had the tanh form; the first BERTs are used with the other.
        return {"activation": "gelu_tanh" if kind == "gpt" else "gelu"}
    head = "gelu_tanh" if given.get("openai_gelu") else "gelu"
    mlp = head
    if not gated and head == "gelu":
        if given.get("squared_relu"):
            mlp = "relu2"
        elif given.get("bias_gelu_fusion") and given.get("add_bias_linear", True):
            mlp = "gelu_tanh"  # the fused kernel's form
    return {"activation": mlp} | ({"head_activation": head} if kind == "bert" else {})


def _vocab_size(stored: Stored, stated: int | None) -> int:
    """The number of tokens before padding; with padding where nothing says it."""
    padded = stored.shapes[WORD_EMBEDDINGS][0]
    said = _said_vocab_size(stored.arguments)
    size = stated or said or padded
    if size > padded:
        source = "--vocab-size" if stated else "args.vocab_size"
        raise CheckpointError(
            f"{stored.where}: {source} {size} is more than the {padded} rows of {WORD_EMBEDDINGS}"
        )
    return size


def _said_vocab_size(given: Mapping[str, Any]) -> int | None:
    # transformers' converter saves it by the second name.
    size = given.get("vocab_size", given.get("orig_vocab_size"))
    if isinstance(size, int) and given.get("tokenizer_type") == "NullTokenizer":
        return size + 1  # there, without the token that ends a document
    return size if isinstance(size, int) else None


def _assumptions(
    stored: Stored, values: Mapping[str, Any], heads: int | None, vocab_size: int | None
) -> Iterator[str]:
    given = stored.arguments
    if not given:
        known = "as in the released models of 345M parameters" if heads is None else "as stated"
        yield (
            f"no args: sizes are those of the tensors, {values['num_layers']} layers of width "
            f"{values['hidden_size']}, and {values['num_attention_heads']} heads {known}"
        )
    defaults = {flag.name: flag.default for flag in flags_of(ModelConfig)}
    for name in _ASSUMED:
        if name not in values:
            yield f"args do not state {name}: {defaults[name]} is assumed"
    if not values["swiglu"] and given.keys().isdisjoint(
        ("openai_gelu", "bias_gelu_fusion", "squared_relu")
    ):
        yield f"args do not state the activation: {values['activation']} is assumed"
    if values["swiglu"] and "swiglu" not in given:
        yield "args do not state what gates the MLP: swiglu is assumed"
    if given.get("onnx_safe"):
        yield "args.onnx_safe: its GELU rounds the square root of 2 to 1.41421, here it is exact"
    if vocab_size is None and _said_vocab_size(given) is None:
        yield (
            f"the checkpoint does not say how many of its {values['vocab_size']} tokens are "
            "padding: none is assumed to be (--vocab-size states it)"
        )


def _checked(values: Mapping[str, Any], where: str) -> ModelConfig:
    """A configuration of values that come from a file, with None for what is as by default."""
    fields: dict[str, Any] = {}
    problems: list[str] = []
    for flag in flags_of(ModelConfig):
        try:
            if flag.name in values:
                fields[flag.name] = flag.read(values[flag.name])
                problems += flag.problems(fields[flag.name])
            elif flag.required:
                problems.append(f"{flag.option} is not known")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(f"{where}: {problem}" for problem in problems)
    return _plain(fields)


def _plain(fields: dict[str, Any]) -> ModelConfig:
    """The configuration of `fields`, without those that say what follows from the others."""
    by_default = {
        "ffn_hidden_size": "ffn_size",
        "kv_channels": "head_size",
        "num_query_groups": "key_value_heads",
        "decoder_num_layers": "decoder_layers",
        "head_activation": "lm_head_activation",
    }
    for name, meaning in by_default.items():
        without = {other: value for other, value in fields.items() if other != name}
        if name in fields and getattr(ModelConfig(**without), meaning) == fields[name]:
            fields = without
    return ModelConfig(**fields)


def tokenizer_files(given: Mapping[str, Any]) -> list[Path]:
    """The tokenizer's files that the arguments name and that are on this disk."""
    paths = (given.get(name) for name in TOKENIZER_FILES)
    return [Path(path) for path in paths if isinstance(path, str) and Path(path).is_file()]
