"""Outputs behave as those of `transformers` do: names, order, and what a tuple of them holds."""

import copy
import pickle
from dataclasses import fields
from typing import Any

import pytest
import torch
import transformers.modeling_outputs as stock
from torch.utils import _pytree
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput
from transformers.models.megatron_bert.modeling_megatron_bert import (
    MegatronBertForPreTrainingOutput,
)

from megatron.hf import outputs

NAMES = [
    "BaseModelOutputWithPoolingAndCrossAttentions",
    "BaseModelOutputWithPastAndCrossAttentions",
    "MaskedLMOutput",
    "CausalLMOutputWithCrossAttentions",
    "NextSentencePredictorOutput",
    "SequenceClassifierOutput",
    "MultipleChoiceModelOutput",
    "TokenClassifierOutput",
    "QuestionAnsweringModelOutput",
]
PAIRS = [(getattr(outputs, name), getattr(stock, name)) for name in NAMES] + [
    (outputs.BertForPreTrainingOutput, BertForPreTrainingOutput),
    (outputs.MegatronBertForPreTrainingOutput, MegatronBertForPreTrainingOutput),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_fields_have_the_documented_order(ours: Any, theirs: Any) -> None:
    assert [field.name for field in fields(ours)] == [field.name for field in fields(theirs)]
    assert all(getattr(ours(), field.name) is None for field in fields(ours))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_items_are_the_fields_that_are_there(ours: Any, theirs: Any) -> None:
    names = [field.name for field in fields(ours)]
    for first in range(len(names)):
        given = {name: torch.tensor(n) for n, name in enumerate(names[first::2])}
        mine, other = ours(**given), theirs(**given)
        assert list(mine.keys()) == list(other.keys())
        assert mine.to_tuple() == other.to_tuple() and len(mine) == len(other)
        assert mine[0] is other[0] and mine[-1] is other[-1]
        assert mine[1:] == other[1:]
        assert (names[first] in mine) and mine[names[first]] is given[names[first]]
        for absent in set(names) - set(given):
            assert getattr(mine, absent) is None and absent not in mine
            with pytest.raises(KeyError):
                mine[absent]


def made() -> outputs.MaskedLMOutput:
    return outputs.MaskedLMOutput(logits=torch.ones(2), hidden_states=(torch.zeros(1),) * 2)


def test_what_is_set_is_an_item_and_an_attribute() -> None:
    output = made()
    output.loss = torch.tensor(1.0)
    assert output["loss"] is output.loss
    output["attentions"] = (torch.tensor(2.0),)
    assert output.attentions is output["attentions"]
    output.note = "no field"
    assert "note" not in output


@pytest.mark.parametrize("change", ["pop", "update", "setdefault"])
def test_nothing_is_taken_away(change: str) -> None:
    with pytest.raises(TypeError, match=change):
        getattr(made(), change)("logits")
    output = made()
    with pytest.raises(TypeError, match="__delitem__"):
        del output["logits"]


def test_a_loss_in_front_shifts_the_tuple() -> None:
    loss, logits = torch.tensor(1.0), torch.ones(2)
    assert outputs.MaskedLMOutput(logits=logits)[0] is logits
    found_loss, found = outputs.MaskedLMOutput(loss, logits).to_tuple()
    assert found_loss is loss and found is logits


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_copies_are_the_same_class_and_values(again: Any) -> None:
    output = made()
    other = again(output)
    assert type(other) is outputs.MaskedLMOutput and list(other) == list(output)
    assert torch.equal(other["logits"], output["logits"]) and len(other["hidden_states"]) == 2


def test_torch_finds_the_tensors() -> None:
    doubled = _pytree.tree_map(lambda tensor: 2 * tensor, made())
    assert type(doubled) is outputs.MaskedLMOutput
    assert doubled.logits is not None and torch.equal(doubled.logits, torch.full((2,), 2.0))
    leaves, _ = _pytree.tree_flatten(made())
    assert len(leaves) == 3


def test_printing_names_the_fields() -> None:
    assert "logits=tensor" in repr(made())
