"""Our GPT with rotary positions, RMSNorm and a gated MLP, and Hugging Face's Llama.

Both turn channel i of a head together with channel i + half, so that weights need no reordering
beside that of heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.checkpoint.hugging_face.architecture import (
    Architecture,
    Fields,
    renamed,
    require,
    require_usual_scale,
    their_activation,
)
from megatron.checkpoint.name_map import Entry, Heads, Stacked
from megatron.config import ModelConfig
from megatron.errors import CheckpointError

_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}
_LINEAR = {"self_attention.dense": "self_attn.o_proj", "mlp.dense_4h_to_h": "mlp.down_proj"}
_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
_BUFFER = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class LlamaArchitecture(Architecture):
    """Llama."""

    model_type = "llama"
    stem = "Llama"
    class_name = "LlamaForCausalLM"
    prefix = "model."

    def model_config_of(self, hf: Mapping[str, Any]) -> ModelConfig:
        """See `Architecture`."""
        fields = Fields(_with_plain_rotations(hf), _DEFAULTS)
        fields.expect({"partial_rotary_factor": 1.0, "mlp_bias": fields["attention_bias"]})
        hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        head_size = hidden // heads if fields["head_dim"] is None else fields.count("head_dim")
        groups = heads
        if fields["num_key_value_heads"] is not None:
            groups = fields.count("num_key_value_heads")
        if heads % groups:
            raise fields.refusal("num_key_value_heads", f"a divisor of {heads} heads")
        activation = fields.activation("hidden_act")
        return ModelConfig(
            model_type="gpt",
            num_layers=fields.count("num_hidden_layers"),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=None if groups == heads else groups,
            kv_channels=None if head_size * heads == hidden else head_size,
            ffn_hidden_size=fields.count("intermediate_size"),
            vocab_size=fields.count("vocab_size"),
            max_position_embeddings=fields.count("max_position_embeddings"),
            position_embedding_type="rope",
            rotary_base=fields.number("rope_theta", "(1, inf)"),
            normalization="RMSNorm",
            layernorm_epsilon=fields.number("rms_norm_eps", "(0, inf)"),
            swiglu=activation == "silu",
            geglu=activation != "silu",
            activation="gelu" if activation == "silu" else activation,
            disable_bias_linear=not fields.truth("attention_bias"),
            hidden_dropout=0.0,
            attention_dropout=fields.number("attention_dropout", "[0, 1)"),
            init_method_std=fields.number("initializer_range", "(0, inf)"),
            untie_embeddings_and_output_weights=not fields.truth("tie_word_embeddings"),
        )

    def settings(self, model: ModelConfig) -> dict[str, Any]:
        """See `Architecture`."""
        require(
            "Llama",
            model,
            {
                "position_embedding_type": ("rope",),
                "rotary_percent": (1.0,),
                "normalization": ("RMSNorm",),
                "norm_position": ("pre",),
                "apply_residual_connection_post_layernorm": (False,),
                "logit_scale": (1.0,),
            },
        )
        require_usual_scale("Llama", model)
        if not model.is_gated:
            raise CheckpointError("neither --swiglu nor --geglu: Llama knows only gated MLPs")
        biases = not model.disable_bias_linear
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.key_value_heads,
            "head_dim": model.head_size,
            "hidden_act": their_activation("silu" if model.swiglu else model.activation),
            "max_position_embeddings": model.max_position_embeddings,
            "initializer_range": model.init_method_std,
            "rms_norm_eps": model.layernorm_epsilon,
            "rope_theta": model.rotary_base,
            "rope_scaling": None,
            "attention_bias": biases,
            "mlp_bias": biases,
            "attention_dropout": model.attention_dropout,
            "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def entries(self, model: ModelConfig, prefix: str | None = None) -> list[Entry]:
        """See `Architecture`."""
        theirs = self.prefix if prefix is None else prefix
        embedding = "language_model.embedding.word_embeddings"
        found = list(renamed({embedding: f"{theirs}embed_tokens"}, ["weight"]))
        for number in range(model.num_layers):
            names = f"language_model.encoder.layers.{number}", f"{theirs}layers.{number}"
            found += _layer_entries(model, *names)
        found += renamed({"language_model.encoder.final_layernorm": f"{theirs}norm"}, ["weight"])
        if model.untie_embeddings_and_output_weights:
            found.append(Entry("language_model.output_layer.weight", ("lm_head.weight",)))
        return found

    def is_ignorable(self, name: str, model: ModelConfig) -> bool:
        """See `Architecture`."""
        return name == "lm_head.weight" or _BUFFER.fullmatch(name) is not None

    def _notes(self, model: ModelConfig) -> Iterator[str]:
        if model.hidden_dropout:
            yield f"--hidden-dropout {model.hidden_dropout}: Llama has no such dropout in training"


def _layer_entries(model: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    yield from renamed({f"{ours}.{o}": f"{theirs}.{t}" for o, t in _NORMS.items()}, ["weight"])
    kinds = ["weight"] if model.disable_bias_linear else ["weight", "bias"]
    yield from renamed({f"{ours}.{o}": f"{theirs}.{t}" for o, t in _LINEAR.items()}, kinds)
    heads = Heads(model.head_size, model.num_attention_heads // model.key_value_heads)
    for kind in kinds:
        three = tuple(f"{theirs}.self_attn.{name}_proj.{kind}" for name in ("q", "k", "v"))
        yield Entry(f"{ours}.self_attention.query_key_value.{kind}", three, heads)
        two = tuple(f"{theirs}.mlp.{name}_proj.{kind}" for name in ("gate", "up"))
        yield Entry(f"{ours}.mlp.dense_h_to_4h.{kind}", two, Stacked())


def _with_plain_rotations(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the fields of rotations at its top, where early releases have them.

    Raises:
        CheckpointError: wavelengths are stretched in one of the ways that models are extended by.
    """
    flat = dict(hf)
    for name in ("rope_scaling", "rope_parameters"):
        stated = hf.get(name) or {}
        kind = stated.get("rope_type", stated.get("type", "default"))
        if kind != "default":
            raise CheckpointError(
                f"config.json: {name} is {stated!r}, expected none or rope_type 'default'"
            )
        flat |= {k: stated[k] for k in ("rope_theta", "partial_rotary_factor") if k in stated}
    return flat
