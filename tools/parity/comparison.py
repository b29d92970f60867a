"""Two recordings of the same training compared, figure by figure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tools.parity.recording import Array, Recording, Tensors

SMALL_GRADIENT = 1e-2


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

    output: float
    loss: float
    norm: float
    gradient: float
    weight: float


def compare(found: Recording, expected: Recording, tolerances: Tolerances) -> list[Row]:
    """The rows of the table: differences relative to what one process found.

    A tensor's difference is that of its norm: single elements may be the small remainder of large
    terms that cancel. So may a whole gradient, such as that of two classes' bias, which add up to
    zero; it is compared with `SMALL_GRADIENT` of the gradient of the whole model where that is
    more. Raises ValueError where the two have not the same tensors.
    """
    small = SMALL_GRADIENT * _norm(*expected.gradients.values.values())
    rows = [
        Row("initial weights", *_worst(found.initial, expected.initial), 0.0),
        _first_output(found.outputs, expected.outputs, tolerances.output),
        Row("loss", *_worst_step(found.losses, expected.losses), tolerances.loss),
        Row("gradient norm", *_worst_step(found.norms, expected.norms), tolerances.norm),
        Row(
            "worst gradient",
            *_worst(found.gradients, expected.gradients, small),
            tolerances.gradient,
        ),
        Row("worst weight", *_worst(found.weights, expected.weights), tolerances.weight),
    ]
    if found.disagreement > 0.0:
        rows.append(Row("ranks' figures", found.disagreement, "losses and norms", 0.0))
    for what, tensors in (
        ("initial weights", found.initial),
        ("gradients", found.gradients),
        ("weights", found.weights),
    ):
        if tensors.unequal:
            name = max(tensors.unequal, key=lambda key: tensors.unequal[key])
            rows.append(Row(f"copies of {what}", tensors.unequal[name], name, 0.0))
    return rows


def _first_output(found: dict[str, float], expected: dict[str, float], tolerance: float) -> Row:
    """The first output beyond the tolerance, in the order of the forward pass, or the worst."""
    if found.keys() != expected.keys():
        raise ValueError(f"not run by both: {', '.join(sorted(found.keys() ^ expected.keys()))}")
    by_name = {
        name: abs(found[name] - square) / (square or 1.0) for name, square in expected.items()
    }
    beyond = [name for name, difference in by_name.items() if not difference <= tolerance]
    where = beyond[0] if beyond else max(by_name, key=lambda name: by_name[name])
    return Row("first wrong output" if beyond else "outputs", by_name[where], where, tolerance)


def differences(found: Tensors, expected: Tensors, least_norm: float = 0.0) -> dict[str, float]:
    """The difference of each tensor relative to its norm, or to `least_norm` if that is more.

    By name in the order of the model.
    """
    if found.values.keys() != expected.values.keys():
        names = sorted(found.values.keys() ^ expected.values.keys())
        raise ValueError(f"not held by both: {', '.join(names)}")
    return {
        name: _relative(found.values[name], tensor, least_norm)
        for name, tensor in expected.values.items()
    }


def _worst(found: Tensors, expected: Tensors, least_norm: float = 0.0) -> tuple[float, str]:
    by_name = differences(found, expected, least_norm)
    worst = max(by_name, key=lambda name: _rank(by_name[name]))
    return by_name[worst], worst


def _worst_step(found: Array, expected: Array) -> tuple[float, str]:
    """[steps, ...] each."""
    by_step = [_relative(mine, theirs) for mine, theirs in zip(found, expected, strict=True)]
    worst = max(range(len(by_step)), key=lambda step: _rank(by_step[step]))
    return by_step[worst], f"step {worst + 1}"


def _relative(found: Array, expected: Array, least_norm: float = 0.0) -> float:
    difference = _norm(np.subtract(found, expected, dtype=np.float64))
    return difference / (max(_norm(expected), least_norm) or 1.0)


def _norm(*arrays: Array) -> float:
    """The Euclidean norm of all elements together."""
    return math.hypot(*(float(np.linalg.norm(np.ravel(a).astype(np.float64))) for a in arrays))


def _rank(difference: float) -> float:
    """A key to sort by: what is not a number is worse than any."""
    return math.inf if math.isnan(difference) else difference
