"""What a checkpoint without arguments is taken for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron.checkpoint.megatron_lm.arguments import Stored, model_config
from megatron.checkpoint.megatron_lm.names import model_specs
from megatron.errors import CheckpointError
from tests.configs import small

VOCAB = 29056


def stored(model_type: str, **sizes: int) -> Stored:
    """The shapes of a model of BERT's or GPT's, and not a word about it."""
    config = small(model_type=model_type, vocab_size=VOCAB, max_position_embeddings=1024, **sizes)
    specs = model_specs(config.model, VOCAB)
    return Stored("file", {}, {name: spec.shape for name, spec in specs.items()}, torch.float16)


@pytest.mark.parametrize("model_type", ["bert", "gpt"])
def test_the_released_models_need_no_word(model_type: str) -> None:
    released = stored(model_type, num_layers=24, hidden_size=1024, num_attention_heads=16)
    model, notes = model_config(released)
    assert (model.num_attention_heads, model.head_size, model.vocab_size) == (16, 64, VOCAB)
    assert (model.model_type, model.fp16, model.layernorm_epsilon) == (model_type, True, 1e-5)
    assert any("16 heads as in the released models" in note for note in notes)
    stated, notes = model_config(released, heads=32)
    assert stated.num_attention_heads == 32
    assert any("32 heads as stated" in note for note in notes)


@pytest.mark.parametrize(("layers", "width"), [(24, 512), (12, 1024)])
def test_heads_of_other_models_have_to_be_stated(layers: int, width: int) -> None:
    other = stored("gpt", num_layers=layers, hidden_size=width, num_attention_heads=16)
    with pytest.raises(CheckpointError, match="state it with --num-attention-heads"):
        model_config(other)
    model, _ = model_config(other, heads=8)
    assert model.num_attention_heads == 8


def test_arguments_without_heads_are_of_no_release() -> None:
    released = stored("gpt", num_layers=24, hidden_size=1024, num_attention_heads=16)
    with pytest.raises(CheckpointError, match="state it with --num-attention-heads"):
        model_config(replace(released, arguments={"hidden_size": 1024}))
