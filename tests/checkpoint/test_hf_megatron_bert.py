"""The map between our BERT and Hugging Face's, against the class it is made for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron.checkpoint.hf_megatron_bert import (
    Entry,
    architecture,
    from_hugging_face,
    hugging_face_config,
    to_hugging_face,
)
from megatron.errors import CheckpointError
from megatron.model import build_bert
from megatron.mpu import ParallelState, Stage
from tests.checkpoint.support import make_config

transformers = pytest.importorskip("transformers")

MODELS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3, "num_attention_heads": 2, "vocab_size": 97, "ffn_hidden_size": 40},
    {"bert_no_binary_head": True, "activation": "gelu_tanh", "layernorm_epsilon": 1e-3},
]


def our_tensors(model: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random values for all global tensors of our model."""
    config = make_config(**model)
    stage = Stage(0, 1, 0, config.model.num_layers)
    parameters = build_bert(config, ParallelState.single(), stage).parameters()
    generator = torch.Generator().manual_seed(0)
    specs = [parameter.shard_spec for parameter in parameters]  # type: ignore[attr-defined]
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in specs}


@pytest.mark.parametrize("model", MODELS)
def test_the_map_is_complete_on_both_sides(model: dict[str, Any]) -> None:
    config = make_config(**model).model
    ours = our_tensors(model)
    theirs = dict(to_hugging_face(config, ours.__getitem__))

    settings = hugging_face_config(config, pad_token_id=0, dtype=torch.float32)
    hf_config = transformers.MegatronBertConfig(**settings)
    hf_model = getattr(transformers, architecture(config))(hf_config)
    shapes = {name: tuple(tensor.shape) for name, tensor in hf_model.state_dict().items()}
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert {name: tuple(t.shape) for name, t in theirs.items()} == {
        name: shape for name, shape in shapes.items() if name not in tied
    }

    back = dict(from_hugging_face(config, theirs.__getitem__))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_rows_of_query_key_value() -> None:
    """[heads, 3, head_size] here; for 2 heads of size 1, rows are q0 k0 v0 q1 k1 v1."""
    entry = Entry("fused", ("query", "key", "value"), heads=2)
    query, key, value = entry.split(torch.arange(6.0))
    assert query.tolist() == [0, 3]
    assert key.tolist() == [1, 4]
    assert value.tolist() == [2, 5]
    assert entry.shapes((6, 4)) == ((2, 4),) * 3


def test_a_head_size_of_its_own_is_refused() -> None:
    model = make_config(kv_channels=8).model
    with pytest.raises(CheckpointError, match="--kv-channels 8"):
        hugging_face_config(model, pad_token_id=0, dtype=torch.float32)


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_their_activation_is_ours(activation: str, approximate: str) -> None:
    model = make_config(activation=activation).model
    name = hugging_face_config(model, pad_token_id=0, dtype=torch.float64)["hidden_act"]
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    theirs = transformers.activations.ACT2FN[name](x)
    assert (theirs - F.gelu(x, approximate=approximate)).abs().max() < 1e-14
