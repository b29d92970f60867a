"""Which architecture a model has, from either side."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from megatron.checkpoint.hugging_face.models import (
    ARCHITECTURES,
    architecture_for,
    entries,
    hugging_face_config,
    model_config_of,
)
from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from tests.checkpoint.hugging_face.support import assert_map_is_complete, theirs_randomised

CLASSES = {
    architecture.model_type: architecture.class_name for architecture in ARCHITECTURES.values()
}


def our_config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "max_position_embeddings": 12,
        "vocab_size": 61,
    }
    return ModelConfig(**(sizes | changes))


def random_sizes(model_type: str, rng: random.Random) -> dict[str, Any]:
    """The fields of a small config.json of their architecture."""
    heads, head_size = rng.randint(1, 4), 2 * rng.randint(1, 4)
    layers, width, vocabulary = rng.randint(1, 3), rng.randint(1, 40), rng.randint(3, 70)
    tied = rng.random() < 0.5
    common = {"vocab_size": vocabulary, "tie_word_embeddings": tied}
    if model_type == "gpt2":
        sizes = {"n_embd": heads * head_size, "n_layer": layers, "n_head": heads, "n_inner": width}
        return common | sizes | {"n_positions": rng.randint(1, 20)}
    if model_type == "t5":
        sizes = {"d_model": 8 * rng.randint(1, 3), "d_kv": head_size, "num_heads": heads}
        sizes |= {"num_layers": layers, "num_decoder_layers": rng.randint(1, 3), "d_ff": width}
        kind = rng.choice(["relu", "gated-gelu", "gated-silu", "gelu"])
        return common | sizes | {"feed_forward_proj": kind}
    groups = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    own = (
        {"num_key_value_heads": groups}
        if model_type == "llama"
        else {"type_vocab_size": rng.randint(1, 4)}
    )
    return (
        common
        | own
        | {
            "hidden_size": heads * head_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": width,
            "max_position_embeddings": rng.randint(1, 20),
        }
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_maps_are_complete_whatever_the_sizes(model_type: str, seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        model_type, **random_sizes(model_type, random.Random(seed))
    )
    config.pad_token_id = 0  # it may lie behind a small vocabulary
    assert_map_is_complete(theirs_randomised(getattr(transformers, CLASSES[model_type])(config)))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_config_json_leaves_out_is_their_default(model_type: str) -> None:
    """The defaults are those of their class."""
    transformers = pytest.importorskip("transformers")
    stock = transformers.AutoConfig.for_model(model_type).to_dict()
    assert model_config_of({"model_type": model_type}) == model_config_of(stock)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "megatron-bert"),
        ({"norm_position": "post"}, "bert"),
        ({"model_type": "gpt"}, "gpt2"),
        ({"model_type": "gpt", "position_embedding_type": "rope"}, "llama"),
        ({"model_type": "t5"}, "t5"),
    ],
)
def test_the_kind_of_network_tells_the_architecture(changes: dict[str, Any], expected: str) -> None:
    assert architecture_for(our_config(**changes)).model_type == expected


def test_a_model_of_no_architecture_is_refused() -> None:
    model = our_config(model_type="gpt", position_embedding_type="relative_key")
    with pytest.raises(CheckpointError, match="--position-embedding-type relative_key: of Hugging"):
        entries(model)


@pytest.mark.parametrize("hf", [{}, {"model_type": "gpt_neox"}, {"model_type": None}])
def test_an_unknown_type_lists_the_known_ones(hf: dict[str, Any]) -> None:
    known = "megatron-bert, bert, gpt2, llama, t5"
    with pytest.raises(CheckpointError, match=f"model_type is .*, expected one of {known}"):
        model_config_of(hf)


def test_what_the_weights_and_the_tokenizer_add() -> None:
    settings = hugging_face_config(
        our_config(), dtype=torch.bfloat16, class_name="X", tokens={"pad_token_id": 7}
    )
    assert settings["architectures"] == ["X"]
    assert settings["torch_dtype"] == "bfloat16"
    assert settings["pad_token_id"] == 7
    assert hugging_face_config(our_config(), dtype=torch.float32)["pad_token_id"] == 0
