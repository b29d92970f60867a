"""The map between our T5 and Hugging Face's, version 1.0 and 1.1."""

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
    LENGTH,
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
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
CASES: list[dict[str, Any]] = [
    {},
    {"feed_forward_proj": "gated-gelu", "own_head": True},
    {"feed_forward_proj": "gated-silu", "num_decoder_layers": 3, "d_kv": 4},
    {"feed_forward_proj": "gelu", "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
]


def their_model(*, own_head: bool = False, **changes: Any) -> Any:
    """Their network; with `own_head` as version 4 had it: neither tied nor scaled."""
    if own_head:
        changes["tie_word_embeddings"] = False
    config = transformers.T5Config(**(SIZES | changes))
    network = transformers.T5ForConditionalGeneration(config)
    if own_head:
        network.lm_head.weight = torch.nn.Parameter(torch.empty(VOCABULARY, 16))
    return theirs_randomised(network)


def our_config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "model_type": "t5",
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "kv_channels": 6,
        "max_position_embeddings": 512,
        "vocab_size": VOCABULARY,
        "ffn_hidden_size": 24,
        "position_embedding_type": "relative",
        "normalization": "RMSNorm",
        "disable_bias_linear": True,
        "activation": "relu",
        "attention_scale": 1.0,
        "logit_scale": 0.25,
    }
    return ModelConfig(**(sizes | changes))


@pytest.mark.parametrize("changes", CASES)
def test_names_shapes_and_values(changes: dict[str, Any]) -> None:
    assert_map_is_complete(their_model(**changes))


@torch.no_grad()
@pytest.mark.parametrize("changes", CASES)
def test_logits_equal_theirs(changes: dict[str, Any]) -> None:
    network = their_model(**changes)
    ids, decoder_ids = tokens(VOCABULARY), tokens(VOCABULARY, seed=1)
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[1, 6:] = 0
    theirs = network(input_ids=ids, attention_mask=real, decoder_input_ids=decoder_ids).logits
    ours = ours_from(network)(ids, decoder_ids, real.bool())
    assert difference(ours, theirs) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"logit_scale": 1.0, "untie_embeddings_and_output_weights": True},
        {"geglu": True, "activation": "gelu_tanh", "decoder_num_layers": 3},
        {"geglu": True, "activation": "gelu"},
        {"swiglu": True, "activation": "gelu", "kv_channels": None},
        {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10},
        {"activation": "gelu", "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ],
)
def test_a_configuration_returns(changes: dict[str, Any]) -> None:
    model = our_config(**changes)
    assert model_config_of(hugging_face_config(model, dtype=torch.float32)) == model


def test_activations_mean_the_same_to_them() -> None:
    """gated-gelu is the tanh form, gelu the erf form, gated-gelu_python a gate of the erf form."""
    for changes, activation in (
        ({"geglu": True, "activation": "gelu_tanh"}, "gelu_new"),
        ({"geglu": True, "activation": "gelu"}, "gelu_python"),
        ({"swiglu": True, "activation": "gelu"}, "silu"),
        ({"activation": "gelu"}, "gelu"),
        ({"activation": "relu"}, "relu"),
    ):
        settings = hugging_face_config(our_config(**changes), dtype=torch.float32)
        config = transformers.T5Config(**settings)
        assert config.dense_act_fn == activation
        assert config.is_gated_act == (len(changes) > 1)


def test_fields_that_state_the_activation_win_as_they_do_there() -> None:
    hf = {"model_type": "t5", **SIZES, "feed_forward_proj": "gated-gelu", "dense_act_fn": "relu"}
    model = model_config_of(hf)
    assert (model.geglu, model.activation) == (True, "relu")


def test_embeddings_that_are_tied_without_a_scale_are_written_twice() -> None:
    model = our_config(logit_scale=1.0)
    written = ARCHITECTURES["t5"].to_write(model, random_tensors(model))
    assert written.copies == {"lm_head.weight": "shared.weight"}
    assert any("written as output layer as well" in note for note in written.notes)
    assert hugging_face_config(model, dtype=torch.float32)["tie_word_embeddings"] is False


def test_what_may_be_present_without_meaning() -> None:
    model = our_config()
    assert is_ignorable("decoder.embed_tokens.weight", model)
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    assert is_ignorable(unused, model)
    assert not is_ignorable("decoder.block.0.layer.1.EncDecAttention.q.weight", model)


def test_one_dropout_for_two_is_a_note() -> None:
    model = our_config(attention_dropout=0.0)
    (note,) = ARCHITECTURES["t5"].to_write(model, random_tensors(model)).notes
    assert "--attention-dropout 0.0" in note


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dense_act_fn": "hardswish"}, "dense_act_fn is 'hardswish'"),
        ({"feed_forward_proj": "mixed-gelu"}, "feed_forward_proj is 'mixed-gelu'"),
        ({"feed_forward_proj": "gated-glue"}, "dense_act_fn is 'glue'"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is False, expected True"),
        ({"num_decoder_layers": 0}, "num_decoder_layers is 0"),
    ],
)
def test_what_ours_cannot_express_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        model_config_of({"model_type": "t5", **SIZES, **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type learned"),
        ({"normalization": "LayerNorm"}, "--normalization LayerNorm: T5 knows only RMSNorm"),
        ({"disable_bias_linear": False}, "--disable-bias-linear False"),
        ({"num_query_groups": 2}, "--num-query-groups 2"),
        ({"attention_scale": None}, "--attention-scale None: T5 knows only 1.0"),
        ({"logit_scale": 0.5}, "--logit-scale 0.5: T5 knows only 0.25 or 1.0"),
        ({"untie_embeddings_and_output_weights": True}, "--logit-scale 0.25: T5 knows only 1.0"),
    ],
)
def test_what_theirs_cannot_express_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        hugging_face_config(our_config(**changes), dtype=torch.float32)
