"""Activations have the same formula under both names; fields of config.json are read with care."""

from __future__ import annotations

import pytest
import torch

from megatron.checkpoint.hugging_face.architecture import Fields, their_activation
from megatron.config.model import ACTIVATIONS
from megatron.errors import CheckpointError
from megatron.ops.activation import ACTIVATIONS as FORMULAS

THEIR_NAMES = [
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_pytorch_tanh",
    "laplace",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
]


def test_activations_equal_theirs_under_every_name() -> None:
    """Their laplace and the constants of their tanh forms are rounded here and there."""
    activations = pytest.importorskip("transformers").activations
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    pairs = [(ours, their_activation(ours)) for ours in ACTIVATIONS]
    pairs += [(Fields({"act": their}, {}).activation("act"), their) for their in THEIR_NAMES]
    for ours, their in pairs:
        assert (FORMULAS[ours](x) - activations.ACT2FN[their](x)).abs().max() < 1e-6, (ours, their)


def test_every_name_that_is_written_is_read() -> None:
    for ours in ACTIVATIONS:
        assert Fields({"act": their_activation(ours)}, {}).activation("act") == ours


def test_where_a_field_is_found() -> None:
    fields = Fields(
        {"b": None, "other": 4}, {"a": 1, "b": 2, "c": 3}, {"a": "other", "c": "absent"}
    )
    assert [fields[name] for name in "abcd"] == [4, 2, 3, None]


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None])
def test_what_is_no_count(value: object) -> None:
    with pytest.raises(CheckpointError, match="n is .*, expected a whole number from 1 on"):
        Fields({"n": value}, {}).count("n")


@pytest.mark.parametrize("value", [1, -0.5, True, "0", float("nan"), None])
def test_what_is_no_probability(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"p is .*, expected a number in \[0, 1\)"):
        Fields({"p": value}, {}).number("p", "[0, 1)")


def test_all_unexpected_values_are_named() -> None:
    with pytest.raises(CheckpointError) as error:
        Fields({"a": 1, "b": 2, "c": 3}, {}).expect({"a": 0, "b": 2, "c": None})
    assert error.value.problems == (
        "config.json: a is 1, expected 0",
        "config.json: c is 3, expected None",
    )
