"""Random small models, and sources of their tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megatron.checkpoint.megatron_lm.names import LM_HEAD_BIAS, has_no_head_bias, model_specs
from megatron.checkpoint.tensor_source import TensorSource
from megatron.config import ModelConfig

Shape = tuple[int, ...]


class Tensors:
    """A `TensorSource` over tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def make_model(**fields: Any) -> ModelConfig:
    """A tiny model."""
    sizes = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "max_position_embeddings": 12,
        "vocab_size": 61,
        "make_vocab_size_divisible_by": 8,
    }
    return ModelConfig(**(sizes | fields))


def random_tensors(model: ModelConfig, seed: int = 0) -> Tensors:
    """Random values for all tensors of a model, its heads included."""
    generator = torch.Generator().manual_seed(seed)
    assert model.vocab_size is not None
    specs = model_specs(model, model.padded_vocab_size(1))
    if has_no_head_bias(model):
        del specs[LM_HEAD_BIAS]
    if model.bert_no_binary_head:
        heads = ("language_model.pooler.", "binary_head.")
        specs = {name: spec for name, spec in specs.items() if not name.startswith(heads)}
    dtype = getattr(torch, model.dtype)
    return Tensors(
        {
            name: torch.randn(spec.shape, generator=generator).to(dtype)
            for name, spec in specs.items()
        }
    )


def random_model(rng: random.Random, *, tensor: int, layers: int, kind: str) -> ModelConfig:
    """A random model that Megatron-LM knows and that divides by `tensor` ranks."""
    groups = tensor * rng.randint(1, 2)
    heads = groups * (rng.randint(1, 3) if kind != "t5" else 1)
    head_size = 2 * rng.randint(1, 4)
    model = make_model(
        model_type=kind,
        num_layers=layers,
        num_attention_heads=heads,
        num_query_groups=groups if groups != heads else None,
        hidden_size=heads * head_size,
        kv_channels=rng.choice([None, 2 * head_size]),
        ffn_hidden_size=rng.choice([None, 6 * tensor]),
        max_position_embeddings=rng.randint(4, 20),
        vocab_size=rng.randint(20, 90),
        apply_residual_connection_post_layernorm=rng.random() < 0.3,
        layernorm_epsilon=rng.choice([1e-5, 1e-6]),
        hidden_dropout=rng.choice([0.0, 0.1]),
        normalization=rng.choice(["LayerNorm", "RMSNorm"]),
        swiglu=(gated := rng.random() < 0.4),
        disable_bias_linear=rng.random() < 0.4,
        position_embedding_type=rng.choice(["learned_absolute", "rope"]),
        untie_embeddings_and_output_weights=kind == "gpt" and rng.random() < 0.5,
        fp16=(half := rng.choice(["", "fp16", "bf16", "fp64"])) == "fp16",
        bf16=half == "bf16",
        fp64=half == "fp64",
    )
    if gated and model.ffn_hidden_size is None:
        model = replace(model, ffn_hidden_size=10 * tensor)
    if model.position_embedding_type == "rope":
        model = replace(model, rotary_base=rng.choice([1e4, 5e5]), rotary_percent=0.5)
    if not gated:
        model = replace(model, activation=rng.choice(["gelu", "gelu_tanh", "relu2"]))
    if kind == "bert":
        model = replace(
            model,
            num_tokentypes=rng.choice([0, 2, 3]),
            bert_no_binary_head=rng.random() < 0.3,
        )
        fused = model.activation == "gelu_tanh" and not model.disable_bias_linear
        if model.activation == "relu2" or (fused and rng.random() < 0.5):
            model = replace(model, head_activation="gelu")
    return model


def assert_equal(found: TensorSource, expected: TensorSource) -> None:
    """Hold one source against another: names, shapes, types and every bit."""
    assert set(found.shapes) == set(expected.shapes)
    assert dict(found.shapes) == dict(expected.shapes)
    assert dict(found.dtypes) == dict(expected.dtypes)
    for name in expected.shapes:
        ours, theirs = found.read(name), expected.read(name)
        assert torch.equal(ours, theirs), name
