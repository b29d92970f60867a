"""Our T5 with relative positions and RMSNorm, and Hugging Face's T5, version 1.0 and 1.1.

Theirs does not divide attention scores by the square root of a head's size, and with tied
embeddings it scores tokens from hidden states times hidden_size ** -0.5. The bias by distance is a
tensor of each stack's first layer there.

Which releases say what: up to version 4, `tie_word_embeddings` false means an output layer of its
own and hidden states as they are. Version 5 always writes true, and says by
`scale_decoder_outputs` whether hidden states are scaled; whether there is an output layer of its
own shows by its tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megatron.checkpoint.hugging_face.architecture import (
    Architecture,
    Fields,
    Found,
    Written,
    refuse_quantised,
    renamed,
    require,
    their_activation,
)
from megatron.checkpoint.name_map import SAME, Entry, Heads, KeyValue, Stacked
from megatron.config import ModelConfig
from megatron.errors import CheckpointError

_HEAD = "lm_head.weight"
_SHARED = "shared.weight"
_USUAL_POSITIONS = 512
_DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "is_encoder_decoder": True,
    "n_positions": _USUAL_POSITIONS,
}
_ALIASES = {"d_model": "hidden_size", "num_heads": "num_attention_heads"} | {
    "num_layers": "num_hidden_layers",
    "d_kv": "head_dim",
}
# A gated MLP without another word is the tanh form there, an ungated one the erf form.
_GATED = {"gelu": "gelu_new"}
_THEIR_GATED = {"gelu_tanh": "gelu", "gelu": "gelu_python"}
_IGNORABLE = {
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    # In files of early releases; nothing has ever used it.
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
}


class T5Architecture(Architecture):
    """T5."""

    model_type = "t5"
    stem = "T5"
    class_name = "T5ForConditionalGeneration"
    prefix = ""

    def model_config_of(self, hf: Mapping[str, Any]) -> ModelConfig:
        """See `Architecture`."""
        fields = Fields(_with_activation(hf), _DEFAULTS, _ALIASES)
        fields.expect({"is_encoder_decoder": True})
        heads, size = fields.count("num_heads"), fields.count("d_kv")
        hidden, layers = fields.count("d_model"), fields.count("num_layers")
        decoder_layers = layers
        if fields["num_decoder_layers"] is not None:
            decoder_layers = fields.count("num_decoder_layers")
        activation, gated = fields.activation("dense_act_fn"), fields.truth("is_gated_act")
        is_swiglu = gated and activation == "silu"
        tied = fields.truth("tie_word_embeddings")
        scaled = (
            tied
            if fields["scale_decoder_outputs"] is None
            else fields.truth("scale_decoder_outputs")
        )
        return ModelConfig(
            model_type="t5",
            num_layers=layers,
            decoder_num_layers=None if decoder_layers == layers else decoder_layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            kv_channels=None if size * heads == hidden else size,
            ffn_hidden_size=fields.count("d_ff"),
            vocab_size=fields.count("vocab_size"),
            max_position_embeddings=fields.count("n_positions"),
            position_embedding_type="relative",
            relative_attention_num_buckets=fields.count("relative_attention_num_buckets"),
            relative_attention_max_distance=fields.count("relative_attention_max_distance"),
            normalization="RMSNorm",
            layernorm_epsilon=fields.number("layer_norm_epsilon", "(0, inf)"),
            activation="gelu" if is_swiglu else activation,
            swiglu=is_swiglu,
            geglu=gated and not is_swiglu,
            disable_bias_linear=True,
            attention_scale=1.0,
            logit_scale=hidden**-0.5 if scaled else 1.0,
            hidden_dropout=fields.number("dropout_rate", "[0, 1)"),
            attention_dropout=fields.number("dropout_rate", "[0, 1)"),
            untie_embeddings_and_output_weights=not tied,
        )

    def settings(self, model: ModelConfig) -> dict[str, Any]:
        """See `Architecture`."""
        require(
            "T5",
            model,
            {
                "position_embedding_type": ("relative",),
                "normalization": ("RMSNorm",),
                "norm_position": ("pre",),
                "apply_residual_connection_post_layernorm": (False,),
                "disable_bias_linear": (True,),
                "num_query_groups": (None, model.num_attention_heads),
                "attention_scale": (1.0,),
            },
        )
        scaled = _is_scaled(model)
        return {
            "vocab_size": model.vocab_size,
            "d_model": model.hidden_size,
            "d_kv": model.head_size,
            "d_ff": model.ffn_size,
            "num_layers": model.num_layers,
            "num_decoder_layers": model.decoder_layers,
            "num_heads": model.num_attention_heads,
            "relative_attention_num_buckets": model.relative_attention_num_buckets,
            "relative_attention_max_distance": model.relative_attention_max_distance,
            "dropout_rate": model.hidden_dropout,
            "layer_norm_epsilon": model.layernorm_epsilon,
            "feed_forward_proj": _projection(model),
            "n_positions": model.max_position_embeddings,
            "is_encoder_decoder": True,
            "tie_word_embeddings": scaled,
            "scale_decoder_outputs": scaled,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        }

    def entries(self, model: ModelConfig, prefix: str | None = None) -> list[Entry]:
        """See `Architecture`."""
        found = [Entry("language_model.embedding.word_embeddings.weight", (_SHARED,))]
        for stack, layers in (("encoder", model.num_layers), ("decoder", model.decoder_layers)):
            ours, theirs = f"language_model.{stack}", f"{stack}.block"
            bias = f"{theirs}.0.layer.0.SelfAttention.relative_attention_bias"
            found += renamed({f"{ours}.relative_bias": bias}, ["weight"])
            for number in range(layers):
                names = f"{ours}.layers.{number}", f"{theirs}.{number}.layer"
                found += _layer_entries(model, *names, decoder=stack == "decoder")
            last = {f"{ours}.final_layernorm": f"{stack}.final_layer_norm"}
            found += renamed(last, ["weight"])
        if model.untie_embeddings_and_output_weights:
            found.append(Entry("language_model.output_layer.weight", (_HEAD,)))
        return found

    def is_ignorable(self, name: str, model: ModelConfig) -> bool:
        """See `Architecture`."""
        return name in _IGNORABLE or name == _HEAD

    def to_write(self, model: ModelConfig, ours: Collection[str]) -> Written:
        """See `Architecture`; embeddings that are tied without a scale are written twice."""
        written = super().to_write(model, ours)
        if model.untie_embeddings_and_output_weights or _is_scaled(model):
            return written
        note = "the word embeddings are written as output layer as well: T5 scales where it ties"
        return dataclasses.replace(written, copies={_HEAD: _SHARED}, notes=(*written.notes, note))

    def found(self, hf: Mapping[str, Any], theirs: Collection[str]) -> Found:
        """See `Architecture`; what version 5 of their package writes is told by its tensors."""
        refuse_quantised(hf)
        model = self.model_config_of(hf)
        if hf.get("scale_decoder_outputs") is False and _HEAD in theirs:
            model = dataclasses.replace(model, untie_embeddings_and_output_weights=True)
        class_name = self.named_class(hf) or self.class_name
        return self.checked(Found(model, self.entries(model), class_name), theirs)

    def _notes(self, model: ModelConfig) -> Iterator[str]:
        if model.attention_dropout != model.hidden_dropout:
            yield (
                f"--attention-dropout {model.attention_dropout}: T5 has one dropout probability; "
                f"dropout_rate is that of hidden states, {model.hidden_dropout}"
            )


def _layer_entries(model: ModelConfig, ours: str, theirs: str, *, decoder: bool) -> Iterator[Entry]:
    size, mlp = model.head_size, 2 if decoder else 1
    modules = {
        "input_layernorm": "0.layer_norm",
        "self_attention.dense": "0.SelfAttention.o",
        "post_attention_layernorm": "1.layer_norm",
        "mlp.dense_4h_to_h": f"{mlp}.DenseReluDense.wo",
    }
    if decoder:
        modules |= {
            "inter_attention.query": "1.EncDecAttention.q",
            "inter_attention.dense": "1.EncDecAttention.o",
            "post_inter_attention_layernorm": "2.layer_norm",
        }
        two = tuple(f"{theirs}.1.EncDecAttention.{name}.weight" for name in "kv")
        yield Entry(f"{ours}.inter_attention.key_value.weight", two, KeyValue(size))
    yield from renamed({f"{ours}.{o}": f"{theirs}.{t}" for o, t in modules.items()}, ["weight"])
    three = tuple(f"{theirs}.0.SelfAttention.{name}.weight" for name in "qkv")
    yield Entry(f"{ours}.self_attention.query_key_value.weight", three, Heads(size))
    names = ("wi_0", "wi_1") if model.is_gated else ("wi",)
    first = tuple(f"{theirs}.{mlp}.DenseReluDense.{name}.weight" for name in names)
    layout = Stacked() if model.is_gated else SAME
    yield Entry(f"{ours}.mlp.dense_h_to_4h.weight", first, layout)


def _is_scaled(model: ModelConfig) -> bool:
    """Whether tokens are scored from scaled hidden states.

    Raises:
        CheckpointError: a scale that T5 does not have, or one beside an output layer of its own.
    """
    if model.logit_scale == 1.0:
        return False
    usual = model.hidden_size**-0.5
    untied = model.untie_embeddings_and_output_weights
    if untied or not math.isclose(model.logit_scale, usual):
        known = "1.0 beside an output layer of its own" if untied else f"{usual} or 1.0"
        raise CheckpointError(f"--logit-scale {model.logit_scale}: T5 knows only {known}")
    return True


def _projection(model: ModelConfig) -> str:
    """Their name of the MLP's kind."""
    activation = "silu" if model.swiglu else model.activation
    if not model.is_gated:
        return their_activation(activation)
    return "gated-" + _THEIR_GATED.get(activation, their_activation(activation))


def _with_activation(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what `feed_forward_proj` stands for; fields that say it win, as there."""
    projection = str(hf.get("feed_forward_proj") or _DEFAULTS["feed_forward_proj"])
    gate, _, activation = projection.rpartition("-")
    if gate not in ("", "gated"):
        raise CheckpointError(
            f"config.json: feed_forward_proj is {projection!r}, expected an activation, or "
            "'gated-' and an activation"
        )
    meant = {
        "dense_act_fn": _GATED.get(activation, activation) if gate else activation,
        "is_gated_act": bool(gate),
    }
    return dict(hf) | {name: hf.get(name, value) for name, value in meant.items()}
