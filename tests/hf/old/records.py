"""Questions put to a model, and its answers as named tensors: the same code for both sides.

Imports nothing but torch, so that it runs beside transformers 4.34.0 as well as beside megatron.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Case = dict[str, Any]
Call = dict[str, Any]


@dataclass
class Answer:
    """What a model returned: tensors by name, and for each call the order of what it returned."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    orders: list[list[str]] = field(default_factory=list)


def make_inputs(case: Case) -> dict[str, Tensor]:
    """The tensors among the arguments of all calls: `0/input_ids` is the first call's."""
    return {
        f"{number}/{name}": _make(value)
        for number, call in enumerate(case["calls"])
        for name, value in call.items()
        if isinstance(value, list | dict)
    }


def _make(value: Any) -> Tensor:
    if isinstance(value, list):
        return torch.tensor(value)
    generator = torch.Generator().manual_seed(value["seed"])
    return torch.randn(value["normal"], generator=generator)


def answer(model: Any, case: Case, inputs: dict[str, Tensor]) -> Answer:
    """Make the case's calls and differentiate the last one's loss, or a weighting of its outputs.

    Each call but the first is given the past key values of the one before it.
    """
    result = Answer()
    leaves = {
        name: tensor.clone().requires_grad_(tensor.is_floating_point() and "mask" not in name)
        for name, tensor in inputs.items()
        if "labels" not in name
    }
    outputs: Any = None
    last = len(case["calls"]) - 1
    for number, call in enumerate(case["calls"]):
        arguments = {
            name: leaves.get(f"{number}/{name}", inputs.get(f"{number}/{name}", value))
            for name, value in call.items()
        }
        if number:
            arguments["past_key_values"] = _past(outputs)
        recorded = number == last or case["through_past"]
        with contextlib.nullcontext() if recorded else torch.no_grad():
            outputs = model(**arguments)
        named = flatten(outputs)
        result.orders.append(list(named))
        for name, tensor in named.items():
            if tensor is not None:
                result.tensors[f"output/{number}/{name}"] = tensor.detach()
    objective(flatten(outputs)).backward()
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            result.tensors[f"input gradient/{name}"] = gradient
    return result


def _past(outputs: Any) -> Any:
    """The past key values: of a tuple, the first member that is a tuple of tuples."""
    if hasattr(outputs, "past_key_values"):
        return outputs.past_key_values
    return next(v for v in outputs if isinstance(v, tuple) and isinstance(v[0], tuple))


def flatten(outputs: Any) -> dict[str, Tensor | None]:
    """Every tensor by its place: `hidden_states.2`, or `1.2` where a tuple was returned."""
    pairs = outputs.items() if hasattr(outputs, "items") else enumerate(outputs)
    named: dict[str, Tensor | None] = {}
    for key, value in pairs:
        if isinstance(value, tuple):
            named |= {f"{key}.{name}": tensor for name, tensor in flatten(value).items()}
        else:
            named[str(key)] = value
    return named


def objective(named: dict[str, Tensor | None]) -> Tensor:
    """The loss where there is one, else a fixed weighting of all outputs."""
    tensors = [t for t in named.values() if t is not None and t.is_floating_point()]
    if tensors[0].dim() == 0:
        return tensors[0]
    terms = []
    for number, tensor in enumerate(tensors):
        places = torch.arange(tensor.numel(), dtype=torch.float32)
        weights = torch.cos(places * 0.7 + number) / tensor.numel() ** 0.5
        terms.append((tensor.reshape(-1) * weights).sum())
    return torch.stack(terms).sum()
