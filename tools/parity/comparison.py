"""Two recordings of the same training compared, figure by figure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.parity.recording import Array, Recording, Tensors


@dataclass(frozen=True)
class Row:
    """One compared quantity: its largest relative difference, and where that is."""

    quantity: str
    difference: float
    where: str
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the tolerance; one that is no number is not."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Tolerances:
    """The largest relative differences that are rounding."""

    loss: float
    norm: float
    gradient: float
    weight: float


def compare(found: Recording, expected: Recording, tolerances: Tolerances) -> list[Row]:
    """The rows of the table: differences relative to what one process found.

    A tensor's difference is that of its norm: single elements may be the small remainder of large
    terms that cancel. Raises ValueError where the two have not the same tensors.
    """
    rows = [
        Row("loss", *_worst_step(found.losses, expected.losses), tolerances.loss),
        Row("gradient norm", *_worst_step(found.norms, expected.norms), tolerances.norm),
        Row("worst gradient", *_worst(found.gradients, expected.gradients), tolerances.gradient),
        Row("worst weight", *_worst(found.weights, expected.weights), tolerances.weight),
    ]
    for what, tensors in (("gradient", found.gradients), ("weight", found.weights)):
        if tensors.unequal:
            name = max(tensors.unequal, key=lambda key: tensors.unequal[key])
            rows.append(Row(f"copies of a {what}", tensors.unequal[name], name, 0.0))
    return rows


def differences(found: Tensors, expected: Tensors) -> dict[str, float]:
    """The relative difference of each tensor's norm, by name in the order of the model."""
    if found.values.keys() != expected.values.keys():
        names = sorted(found.values.keys() ^ expected.values.keys())
        raise ValueError(f"not held by both: {', '.join(names)}")
    return {name: _relative(found.values[name], tensor) for name, tensor in expected.values.items()}


def _worst(found: Tensors, expected: Tensors) -> tuple[float, str]:
    by_name = differences(found, expected)
    worst = max(by_name, key=lambda name: _rank(by_name[name]))
    return by_name[worst], worst


def _worst_step(found: Array, expected: Array) -> tuple[float, str]:
    """[steps, ...] each."""
    by_step = [_relative(mine, theirs) for mine, theirs in zip(found, expected, strict=True)]
    worst = max(range(len(by_step)), key=lambda step: _rank(by_step[step]))
    return by_step[worst], f"step {worst + 1}"


def _relative(found: Array, expected: Array) -> float:
    difference = np.linalg.norm(np.ravel(found).astype(np.float64) - np.ravel(expected))
    norm = np.linalg.norm(np.ravel(expected).astype(np.float64))
    return float(difference / norm) if norm else float(difference)


def _rank(difference: float) -> float:
    """A key to sort by: what is not a number is worse than any."""
    return float("inf") if np.isnan(difference) else difference
