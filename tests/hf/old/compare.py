"""megatron/hf held against what transformers 4.34.0 answered.

Two tensors agree where their largest difference is at most 1e-5 of the larger of 1 and the
reference's largest value: absolutely where values are small, relatively where they are large. A
tensor that is small altogether must be right as well: the difference is at most a thousandth of its
largest value, or 1e-6, the rounding of terms that cancel. Names, their order, shapes and number
formats must be the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron.hf
from tests.hf.old.records import Answer, Case, answer

TOLERANCE, OF_SMALL, ROUNDING = 1e-5, 1e-3, 1e-6
# A table that transformers keeps beside relative positions, and that nothing reads.
UNUSED = "embeddings.position_embeddings.weight"


@dataclass(frozen=True)
class Difference:
    """The largest difference of two tensors, and the largest value of the reference."""

    name: str
    largest_difference: float
    largest_value: float

    @property
    def relative(self) -> float:
        """The difference in units of the larger of 1 and the reference's largest value."""
        return self.largest_difference / max(1.0, self.largest_value)

    @property
    def agrees(self) -> bool:
        """Whether the difference is rounding; one that is no number is not."""
        return self.relative <= TOLERANCE and (
            self.largest_difference <= max(OF_SMALL * self.largest_value, ROUNDING)
        )

    @property
    def quantity(self) -> str:
        """Output, gradient or input gradient."""
        return self.name.split("/")[0]


@dataclass(frozen=True)
class Expected:
    """What the oracle wrote of a case."""

    case: Case
    orders: list[list[str]]
    second_names: dict[str, str]
    loading: dict[str, list[str]]
    config: dict[str, Any]
    inputs: dict[str, Tensor]
    tensors: dict[str, Tensor]


def read_answer(directory: Path) -> Expected:
    """The oracle's answer in ``directory``; raises RuntimeError where it failed."""
    from safetensors.torch import load_file

    record = json.loads((directory / "answer.json").read_text())
    if "error" in record:
        raise RuntimeError(f"transformers 4.34.0 failed:\n{record['error']}")
    stored = load_file(directory / "answer.safetensors")
    inputs = {n.removeprefix("input/"): t for n, t in stored.items() if n.startswith("input/")}
    return Expected(
        record["case"],
        record["orders"],
        record["second_names"],
        record["loading"],
        record["config"],
        inputs,
        {name: tensor for name, tensor in stored.items() if not name.startswith("input/")},
    )


def load_ours(case: Case, directory: Path, tensor: int = 1, pipeline: int = 1) -> Any:
    """Our class of the same name with the weights in ``directory``."""
    model_class = getattr(megatron.hf, case["class"])
    model = model_class.from_pretrained(
        directory,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        **case["arguments"],
    )
    assert not model.training, "from_pretrained returned a model in training mode"
    for name, value in case["config"].items():
        found = getattr(model.config, name)
        assert found == value, f"config.{name} is {found!r}, and was saved as {value!r}"
    return model


def answer_ours(model: Any, expected: Expected) -> Answer:
    """What our model returns to the same calls, with the gradients of all its parameters.

    What has none counts as zero, on either side.
    """
    result = answer(model, expected.case, expected.inputs)
    gradients = model.full_state_dict(gradients=True)
    for name, weight in model.full_state_dict().items():
        if name not in expected.second_names:
            gradient = gradients.pop(name, None)
            whole = torch.zeros_like(weight) if gradient is None else gradient
            result.tensors[f"gradient/{name}"] = whole
    assert not gradients, f"gradients of no weight: {sorted(gradients)}"
    return result


def differences(found: Answer, expected: Expected) -> list[Difference]:
    """Every tensor's difference; raises AssertionError where the two have not the same tensors."""
    assert found.orders == expected.orders, (
        f"returned {found.orders}, where transformers returns {expected.orders}"
    )
    relative = expected.case["config"]["position_embedding_type"] != "absolute"
    ours, theirs = (
        {n: t for n, t in tensors.items() if not (relative and n.endswith(UNUSED))}
        for tensors in (found.tensors, expected.tensors)
    )
    assert ours.keys() == theirs.keys(), (
        f"missing {sorted(theirs.keys() - ours.keys())}, "
        f"unexpected {sorted(ours.keys() - theirs.keys())}"
    )
    return [difference(name, ours[name], theirs[name]) for name in theirs]


def difference(name: str, ours: Tensor, theirs: Tensor) -> Difference:
    """How far two tensors are apart; raises AssertionError where they are not of a kind."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), (
        f"{name} is {tuple(ours.shape)} {ours.dtype}, "
        f"where transformers has {tuple(theirs.shape)} {theirs.dtype}"
    )
    if theirs.numel() == 0:
        return Difference(name, 0.0, 0.0)
    largest = (ours.double() - theirs.double()).abs().max()
    return Difference(name, float(largest), float(theirs.abs().max()))


def check(directory: Path, tensor: int = 1, pipeline: int = 1) -> list[Difference]:
    """Load the model that the oracle saved in ``directory`` and compare all that it returns."""
    expected = read_answer(directory)
    model = load_ours(expected.case, directory / "model", tensor, pipeline)
    return differences(answer_ours(model, expected), expected)


def disagreements(found: list[Difference]) -> list[str]:
    """A line for each tensor that differs, the worst first."""
    wrong = sorted((d for d in found if not d.agrees), key=lambda d: -d.largest_difference)
    return [
        f"{d.name}: differs by {d.largest_difference:.1e}, largest value {d.largest_value:.1e}"
        for d in wrong
    ]


def worst(found: list[Difference]) -> Mapping[str, Difference]:
    """The largest difference of each quantity."""
    by_quantity: dict[str, Difference] = {}
    for difference in sorted(found, key=lambda d: d.relative):
        by_quantity[difference.quantity] = difference
    return by_quantity
