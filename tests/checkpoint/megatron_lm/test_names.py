"""The list of a model's tensors against the network itself, and the names of the releases."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron.checkpoint.megatron_lm.names import (
    LM_HEAD_BIAS,
    canonical,
    has_no_head_bias,
    model_specs,
    stored_path,
)
from megatron.config import ModelConfig
from megatron.model import build_bert, build_gpt, build_t5
from megatron.mpu import ParallelState, ShardSpec, Stage
from tests.checkpoint.megatron_lm.support import make_model, random_model
from tests.checkpoint.support import make_config


def specs_of_the_network(model: ModelConfig) -> dict[str, ShardSpec]:
    """What the parameters of a network of one process say about themselves."""
    config = replace(make_config(), model=model)
    build = {"bert": build_bert, "gpt": build_gpt, "t5": build_t5}[model.model_type]
    is_t5 = model.model_type == "t5"
    decoder = model.decoder_layers if is_t5 else 0
    stage = Stage(0, 1, 0, model.num_layers, 0, decoder, 0 if is_t5 else None)
    network = build(config, ParallelState.single(), stage)
    specs = [parameter.shard_spec for parameter in network.parameters()]  # type: ignore[attr-defined]
    return {spec.name: spec for spec in specs}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["bert", "gpt", "t5"])
def test_every_tensor_is_listed(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    model = replace(
        random_model(rng, tensor=rng.randint(1, 2), layers=rng.randint(1, 2), kind=kind),
        bert_no_binary_head=False,
    )
    print(seed, model)
    listed = model_specs(model, model.padded_vocab_size(1))
    if has_no_head_bias(model):
        del listed[LM_HEAD_BIAS]
    assert listed == specs_of_the_network(model)


@pytest.mark.parametrize(
    ("old", "current"),
    [
        ("word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("transformer.final_layernorm.bias", "encoder.final_layernorm.bias"),
        ("transformer.layers.3.attention.dense.bias", "encoder.layers.3.self_attention.dense.bias"),
        ("encoder.layers.3.self_attention.dense.bias",) * 2,
        ("decoder.layers.0.inter_attention.dense.bias",) * 2,
        ("encoder.layers.0.input_norm.weight", "encoder.layers.0.input_layernorm.weight"),
        ("encoder.final_norm.weight", "encoder.final_layernorm.weight"),
        ("pooler.dense.weight",) * 2,
    ],
)
def test_names_of_older_and_newer_releases(old: str, current: str) -> None:
    assert canonical(f"language_model.{old}") == f"language_model.{current}"


def test_only_what_has_rms_norms_has_their_names() -> None:
    name = "language_model.encoder.layers.0.post_attention_layernorm.weight"
    rms = make_model(normalization="RMSNorm")
    assert stored_path(name, make_model())[-1] == "layers.0.post_attention_layernorm.weight"
    assert stored_path(name, rms)[-1] == "layers.0.post_attention_norm.weight"
    head = stored_path("lm_head.layernorm.weight", rms)
    assert head == ("lm_head", "norm.weight")
    assert canonical(".".join(head)) == "lm_head.layernorm.weight"
