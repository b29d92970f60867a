"""The installed transformers loads what we save without a key too many or too few, and agrees.

Releases from 5 on know absolute positions only: saving a model with relative ones warns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import megatron.hf
from tests.hf.old.cases import CLASSES, kind
from tests.hf.old.records import flatten

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.1,
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_loads_without_a_key_too_many_or_too_few(name: str, safe: bool, tmp_path: Path) -> None:
    torch.manual_seed(len(name))
    ours = _model(name, tie_word_embeddings=safe)
    ours.save_pretrained(tmp_path / "ours", safe_serialization=safe, max_shard_size="20KB")
    theirs, loading = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(loading.values()), loading

    inputs = _inputs(name)
    found, expected = flatten(ours(**inputs)), flatten(theirs.eval()(**inputs))
    _assert_close(found, expected)
    theirs.save_pretrained(tmp_path / "theirs")
    back = type(ours).from_pretrained(tmp_path / "theirs")
    _assert_close(flatten(back(**inputs)), expected)


def _model(name: str, **config: Any) -> Any:
    """A model of ours none of whose weights are trivial."""
    model_class = getattr(megatron.hf, name)
    decoder = kind(name) == "ForCausalLM"
    cross = {"is_decoder": decoder, "add_cross_attention": decoder}
    model = model_class(model_class.config_class(**SIZES, **cross, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def _inputs(name: str) -> dict[str, Any]:
    """Tokens of two kinds with padding; for a decoder also states of an encoder."""
    size = (2, 3, 7) if kind(name) == "ForMultipleChoice" else (2, 7)
    mask = torch.ones(size, dtype=torch.int64)
    mask[0, ..., 5:] = 0
    inputs: dict[str, Any] = {
        "input_ids": torch.randint(SIZES["vocab_size"], size),
        "token_type_ids": torch.randint(2, size),
        "attention_mask": mask,
    }
    if kind(name) == "ForCausalLM":
        # As long as the tokens: release 5.23 of MegatronBERT fails with any other length.
        states = torch.ones(2, 7, dtype=torch.int64)
        states[1, 4:] = 0
        inputs |= {
            "encoder_hidden_states": torch.randn(2, 7, SIZES["hidden_size"]),
            "encoder_attention_mask": states,
            "use_cache": False,
        }
    return inputs


def _assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["relative_key", "relative_key_query"])
@pytest.mark.parametrize("name", ["MegatronBertForMaskedLM", "BertForMaskedLM"])
def test_saving_relative_positions_warns(name: str, positions: str, tmp_path: Path) -> None:
    model = _model(name, position_embedding_type=positions)
    with pytest.warns(UserWarning, match=positions):
        model.save_pretrained(tmp_path)
