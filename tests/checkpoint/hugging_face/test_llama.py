"""The map between our GPT with rotary positions and Hugging Face's Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.checkpoint.hugging_face.models import (
    ARCHITECTURES,
    hugging_face_config,
    is_ignorable,
    model_config_of,
)
from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from tests.checkpoint.hugging_face.support import (
    TOLERANCE,
    assert_map_is_complete,
    difference,
    ours_from,
    random_tensors,
    theirs_randomised,
    tokens,
)

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
}
CASES: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 2, "tie_word_embeddings": True},
    {"num_key_value_heads": 1, "rms_norm_eps": 1e-3, "rope_theta": 500.0},
    {"head_dim": 6, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
]


def their_model(**changes: Any) -> Any:
    config = transformers.LlamaConfig(**(SIZES | changes))
    return theirs_randomised(transformers.LlamaForCausalLM(config))


def our_config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "model_type": "gpt",
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "max_position_embeddings": 12,
        "vocab_size": VOCABULARY,
        "ffn_hidden_size": 24,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
        "hidden_dropout": 0.0,
    }
    return ModelConfig(**(sizes | changes))


@pytest.mark.parametrize("changes", CASES)
def test_names_shapes_and_values(changes: dict[str, Any]) -> None:
    assert_map_is_complete(their_model(**changes))


@torch.no_grad()
@pytest.mark.parametrize("changes", CASES)
def test_logits_equal_theirs(changes: dict[str, Any]) -> None:
    network = their_model(**changes)
    ids = tokens(VOCABULARY)
    assert difference(ours_from(network)(ids), network(ids).logits) < TOLERANCE


@torch.no_grad()
def test_a_written_configuration_means_the_same_to_them() -> None:
    """The base of rotations, among others, stands where every release finds it."""
    network = their_model(rope_theta=500.0, num_key_value_heads=2, tie_word_embeddings=True)
    settings = hugging_face_config(model_config_of(network.config.to_dict()), dtype=torch.float32)
    again = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    again.load_state_dict(network.state_dict())
    ids = tokens(VOCABULARY)
    assert torch.equal(again(ids).logits, network(ids).logits)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 2, "untie_embeddings_and_output_weights": True},
        {"rotary_base": 5e5, "layernorm_epsilon": 1e-6, "kv_channels": 6},
        {"swiglu": False, "geglu": True, "activation": "gelu_tanh", "disable_bias_linear": False},
        {"swiglu": False, "geglu": True, "attention_dropout": 0.0},
    ],
)
def test_a_configuration_returns(changes: dict[str, Any]) -> None:
    model = our_config(**changes)
    assert model_config_of(hugging_face_config(model, dtype=torch.float32)) == model


def test_dropout_that_theirs_lacks_is_a_note() -> None:
    model = our_config(hidden_dropout=0.1)
    (note,) = ARCHITECTURES["llama"].to_write(model, random_tensors(model)).notes
    assert "--hidden-dropout 0.1" in note


def test_what_may_be_present_without_meaning() -> None:
    model = our_config()
    assert is_ignorable("model.layers.0.self_attn.rotary_emb.inv_freq", model)
    assert not is_ignorable("model.layers.0.self_attn.q_norm.weight", model)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_plain_rotations_are_understood_wherever_they_stand(name: str) -> None:
    hf = {"model_type": "llama", **SIZES, name: {"rope_type": "default", "rope_theta": 500.0}}
    assert model_config_of(hf).rotary_base == 500.0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is {'type': 'linear'"),
        (
            {"rope_parameters": {"rope_type": "llama3"}},
            "rope_parameters is {'rope_type': 'llama3'}",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1.0"),
        ({"attention_bias": True}, "mlp_bias is False, expected True"),
        ({"mlp_bias": True}, "mlp_bias is True, expected False"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of 4"),
        ({"hidden_act": "xielu"}, "hidden_act is 'xielu'"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
    ],
)
def test_what_ours_cannot_express_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        model_config_of({"model_type": "llama", **SIZES, **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"normalization": "LayerNorm"}, "--normalization LayerNorm: Llama knows only RMSNorm"),
        ({"norm_position": "post"}, "--norm-position post"),
        ({"swiglu": False}, "neither --swiglu nor --geglu"),
        ({"rotary_percent": 0.5}, "--rotary-percent 0.5"),
        ({"attention_scale": 1.0}, "--attention-scale 1.0"),
        ({"logit_scale": 0.5}, "--logit-scale 0.5"),
    ],
)
def test_what_theirs_cannot_express_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        hugging_face_config(our_config(**changes), dtype=torch.float32)
