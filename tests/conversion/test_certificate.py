"""What is compared, what is said, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron.conversion.certificate import Side, compare
from megatron.conversion.stored_model import StoredModel
from megatron.errors import CheckpointError
from tests.conversion.support import BERT, GPT, GPT2, stored, without


def side(model: StoredModel) -> Side:
    return Side(model, "somewhere", stock=False)


def test_equal_models_are_equal() -> None:
    model, _ = stored(**BERT)
    certificate = compare(side(model), side(model), accept_difference=False)
    assert certificate["max_abs_logit_diff"] == 0.0
    assert set(certificate["max_abs_logit_diff_of"]) == {"masked_lm", "next_sentence"}
    assert certificate["max_abs_logit"] > 0.0
    assert certificate["compared"] == "logits"
    assert certificate["differences"] == []
    assert not certificate["accepted"]
    assert 0 in certificate["input"]["attention_mask"][1]


@pytest.mark.parametrize("seed", range(3))
def test_one_flipped_bit_anywhere_is_found(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model, _ = stored(**GPT)
    other, _ = stored(**GPT)
    names = list(other.source.shapes)
    name = names[int(torch.randint(len(names), (), generator=generator))]
    values = other.source._tensors[name] = other.source._tensors[name].clone()
    place = int(torch.randint(values.numel() * 4, (), generator=generator))
    values.view(-1).view(torch.uint8)[place] ^= 1
    with pytest.raises(CheckpointError, match=f"^{name} changed on the way: nothing was written"):
        compare(side(model), side(other), accept_difference=True)


def test_other_mathematics_are_named_measured_and_refused() -> None:
    model, _ = stored(**BERT)
    fields = {"activation": "relu", "layernorm_epsilon": 0.5}
    other = dataclasses.replace(model, model=dataclasses.replace(model.model, **fields))
    with pytest.raises(CheckpointError, match=r"differ by .*, more than 0.001: nothing was wri"):
        compare(side(model), side(other), accept_difference=False)
    certificate = compare(side(model), side(other), accept_difference=True)
    assert certificate["accepted"]
    assert certificate["max_abs_logit_diff"] > 1e-3
    assert "activation is gelu in the source and relu in the target" in certificate["differences"]
    assert any("layernorm_epsilon" in line for line in certificate["differences"])


def test_values_that_are_no_numbers_fail() -> None:
    model, _ = stored(**GPT2)
    name = "language_model.encoder.final_layernorm.weight"
    model.source._tensors[name] = torch.full_like(model.source._tensors[name], torch.nan)
    with pytest.raises(CheckpointError, match="differ by nan"):
        compare(side(model), side(model), accept_difference=False)


def test_a_lost_head_is_named_and_a_model_without_heads_compared_below() -> None:
    model, _ = stored(**BERT)
    other, _ = stored(**BERT)
    without(other.source, "binary_head")
    certificate = compare(side(model), side(other), accept_difference=False)
    assert list(certificate["max_abs_logit_diff_of"]) == ["masked_lm"]
    assert "computed on one side only: next_sentence" in certificate["differences"]
    without(other.source, "lm_head")
    certificate = compare(side(model), side(other), accept_difference=False)
    assert set(certificate["max_abs_logit_diff_of"]) == {"hidden_states", "pooled"}
    assert certificate["compared"] == "hidden states"


def test_another_number_format_is_said_and_compared() -> None:
    model, _ = stored(**GPT)
    half = model.with_dtype(torch.bfloat16)
    assert set(half.source.dtypes.values()) == {torch.bfloat16}
    assert "values were converted from float32 to bfloat16" in half.notes
    assert model.with_dtype(torch.float32) is model
    certificate = compare(side(half), side(half), accept_difference=False)
    assert certificate["max_abs_logit_diff"] == 0.0
