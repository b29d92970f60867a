"""Our GPT with learned positions, LayerNorm and tied embeddings, and Hugging Face's GPT-2.

Their linear layers hold the transposed matrix, [inputs, outputs], and one of them holds query, key
and value side by side: `Conv1D` turns it and orders its rows by heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.checkpoint.hugging_face.architecture import (
    Architecture,
    Fields,
    has_usual_scale,
    renamed,
    require,
    require_whole_heads,
    their_activation,
)
from megatron.checkpoint.name_map import Conv1D, Entry, Heads
from megatron.config import ModelConfig
from megatron.errors import CheckpointError

_BOTH = ("weight", "bias")
_NORMS = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}
_LINEAR = {
    "self_attention.dense": "attn.c_proj",
    "mlp.dense_h_to_4h": "mlp.c_fc",
    "mlp.dense_4h_to_h": "mlp.c_proj",
}
_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_ALIASES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")


class GPT2Architecture(Architecture):
    """GPT-2."""

    model_type = "gpt2"
    stem = "GPT2"
    class_name = "GPT2LMHeadModel"
    prefix = "transformer."

    def model_config_of(self, hf: Mapping[str, Any]) -> ModelConfig:
        """See `Architecture`."""
        fields = Fields(hf, _DEFAULTS, _ALIASES)
        fields.expect(
            {
                "scale_attn_by_inverse_layer_idx": False,
                "reorder_and_upcast_attn": False,
                "add_cross_attention": False,
                "embd_pdrop": fields["resid_pdrop"],  # ours is one probability
            }
        )
        hidden, heads = fields.count("n_embd"), fields.count("n_head")
        if hidden % heads:
            raise fields.refusal("n_head", f"a divisor of n_embd {hidden}")
        return ModelConfig(
            model_type="gpt",
            num_layers=fields.count("n_layer"),
            hidden_size=hidden,
            num_attention_heads=heads,
            ffn_hidden_size=4 * hidden if fields["n_inner"] is None else fields.count("n_inner"),
            vocab_size=fields.count("vocab_size"),
            max_position_embeddings=fields.count("n_positions"),
            layernorm_epsilon=fields.number("layer_norm_epsilon", "(0, inf)"),
            activation=fields.activation("activation_function"),
            attention_scale=None if fields.truth("scale_attn_weights") else 1.0,
            hidden_dropout=fields.number("resid_pdrop", "[0, 1)"),
            attention_dropout=fields.number("attn_pdrop", "[0, 1)"),
            init_method_std=fields.number("initializer_range", "(0, inf)"),
            untie_embeddings_and_output_weights=not fields.truth("tie_word_embeddings"),
        )

    def settings(self, model: ModelConfig) -> dict[str, Any]:
        """See `Architecture`."""
        require(
            "GPT-2",
            model,
            {
                "position_embedding_type": ("learned_absolute",),
                "normalization": ("LayerNorm",),
                "norm_position": ("pre",),
                "apply_residual_connection_post_layernorm": (False,),
                "swiglu": (False,),
                "geglu": (False,),
                "disable_bias_linear": (False,),
                "num_query_groups": (None, model.num_attention_heads),
                "logit_scale": (1.0,),
            },
        )
        require_whole_heads("GPT-2", model)
        if not has_usual_scale(model) and model.attention_scale != 1.0:
            raise CheckpointError(
                f"--attention-scale {model.attention_scale}: GPT-2 knows only "
                f"1 / sqrt({model.head_size}) and 1.0"
            )
        return {
            "vocab_size": model.vocab_size,
            "n_positions": model.max_position_embeddings,
            "n_embd": model.hidden_size,
            "n_layer": model.num_layers,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_size,
            "activation_function": their_activation(model.activation),
            "resid_pdrop": model.hidden_dropout,
            "embd_pdrop": model.hidden_dropout,
            "attn_pdrop": model.attention_dropout,
            "layer_norm_epsilon": model.layernorm_epsilon,
            "initializer_range": model.init_method_std,
            "scale_attn_weights": has_usual_scale(model),
            "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
            # Theirs are GPT-2's own vocabulary's where nothing is said.
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def entries(self, model: ModelConfig, prefix: str | None = None) -> list[Entry]:
        """See `Architecture`."""
        theirs = self.prefix if prefix is None else prefix
        tables = {"word_embeddings": "wte", "position_embeddings": "wpe"}
        found = list(
            renamed(
                {f"language_model.embedding.{o}": f"{theirs}{t}" for o, t in tables.items()},
                ["weight"],
            )
        )
        for number in range(model.num_layers):
            names = f"language_model.encoder.layers.{number}", f"{theirs}h.{number}"
            found += _layer_entries(model, *names)
        found += renamed({"language_model.encoder.final_layernorm": f"{theirs}ln_f"}, _BOTH)
        if model.untie_embeddings_and_output_weights:
            found.append(Entry("language_model.output_layer.weight", ("lm_head.weight",)))
        return found

    def is_ignorable(self, name: str, model: ModelConfig) -> bool:
        """See `Architecture`."""
        return name == "lm_head.weight" or _BUFFER.fullmatch(name) is not None


def _layer_entries(model: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    yield from renamed({f"{ours}.{o}": f"{theirs}.{t}" for o, t in _NORMS.items()}, _BOTH)
    for kind in _BOTH:
        for our, their in _LINEAR.items():
            yield Entry(f"{ours}.{our}.{kind}", (f"{theirs}.{their}.{kind}",), Conv1D())
        yield Entry(
            f"{ours}.self_attention.query_key_value.{kind}",
            (f"{theirs}.attn.c_attn.{kind}",),
            Conv1D(Heads(model.head_size)),
        )
