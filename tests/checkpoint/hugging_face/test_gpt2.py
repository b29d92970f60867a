"""The map between our GPT and Hugging Face's GPT-2, against the class it is made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.checkpoint.hugging_face.models import (
    hugging_face_config,
    is_ignorable,
    model_config_of,
    open_hugging_face,
)
from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from tests.checkpoint.hugging_face.support import (
    TOLERANCE,
    DictSource,
    assert_map_is_complete,
    difference,
    ours_from,
    random_tensors,
    state_of,
    theirs_randomised,
    tokens,
)

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 12,
}
CASES: list[dict[str, Any]] = [
    {},
    {"n_inner": 24, "scale_attn_weights": False, "activation_function": "relu"},
    {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3, "activation_function": "gelu"},
]


def their_model(**changes: Any) -> Any:
    config = transformers.GPT2Config(**(SIZES | changes))
    return theirs_randomised(transformers.GPT2LMHeadModel(config))


def our_config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "model_type": "gpt",
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "max_position_embeddings": 12,
        "vocab_size": VOCABULARY,
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


def test_files_of_the_bare_network_and_of_early_releases() -> None:
    """Those of the hub's gpt2 have no prefix, and hold the buffers of masks."""
    network = their_model()
    state = {name.removeprefix("transformer."): t for name, t in state_of(network).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
    state["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    opened = open_hugging_face(network.config.to_dict(), DictSource(state))
    assert opened.tensors.shapes.keys() == random_tensors(opened.model).keys()


def test_what_may_be_present_without_meaning() -> None:
    model = our_config()
    assert is_ignorable("lm_head.weight", model)
    assert is_ignorable("transformer.h.11.attn.bias", model)
    assert not is_ignorable("transformer.h.11.attn.c_attn.bias", model)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_scale": 1.0, "activation": "gelu_tanh", "hidden_dropout": 0.25},
        {"untie_embeddings_and_output_weights": True, "ffn_hidden_size": 24},
        {"layernorm_epsilon": 1e-3, "attention_dropout": 0.0, "init_method_std": 0.5},
    ],
)
def test_a_configuration_returns(changes: dict[str, Any]) -> None:
    model = our_config(**({"ffn_hidden_size": 64} | changes))
    assert model_config_of(hugging_face_config(model, dtype=torch.float32)) == model


def test_names_that_sizes_have_elsewhere_are_understood() -> None:
    model = model_config_of({"model_type": "gpt2", "hidden_size": 24, "num_attention_heads": 3})
    assert (model.hidden_size, model.num_attention_heads, model.ffn_size) == (24, 3, 96)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True, expected False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"embd_pdrop": 0.0}, "embd_pdrop is 0.0, expected 0.1"),
        ({"activation_function": "prelu"}, "activation_function is 'prelu'"),
        ({"n_head": 3}, "n_head is 3, expected a divisor of n_embd 16"),
        ({"n_inner": True}, "n_inner is True, expected a whole number"),
    ],
)
def test_what_ours_cannot_express_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        model_config_of({"model_type": "gpt2", **SIZES, **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"normalization": "RMSNorm"}, "--normalization RMSNorm: GPT-2 knows only LayerNorm"),
        ({"norm_position": "post"}, "--norm-position post"),
        ({"swiglu": True}, "--swiglu True"),
        ({"disable_bias_linear": True}, "--disable-bias-linear True"),
        ({"num_query_groups": 2}, "--num-query-groups 2: GPT-2 knows only None or 4"),
        ({"kv_channels": 6}, "--kv-channels 6"),
        ({"attention_scale": 0.3}, "--attention-scale 0.3"),
        ({"logit_scale": 0.5}, "--logit-scale 0.5"),
    ],
)
def test_what_theirs_cannot_express_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        hugging_face_config(our_config(**changes), dtype=torch.float32)
