"""Which architecture a model has, from either side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.checkpoint.hf_models import (
    ARCHITECTURES,
    architecture_for,
    entries,
    hugging_face_config,
    model_config_of,
)
from megatron.config import ModelConfig
from megatron.errors import CheckpointError


def our_config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "max_position_embeddings": 12,
        "vocab_size": 61,
    }
    return ModelConfig(**(sizes | changes))


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
