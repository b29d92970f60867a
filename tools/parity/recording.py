"""What a short training came to, as whole tensors by global name, however it was spread.

Each rank records its pieces (:func:`record`); :func:`assemble` puts the pieces of all ranks
together. Where several ranks hold the same numbers, their copies are compared on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron.mpu import ShardSpec
from megatron.optimizer.flat_buffer import shard_spec
from megatron.optimizer.optimizer import StepResult
from megatron.training.task import Batch
from megatron.training.trainer import Trainer
from tools.parity.outputs import Moments, mean_squares, watched_outputs

Array = npt.NDArray[np.floating]


class Piece(NamedTuple):
    """A stretch of one rank's part of a tensor.

    Arrays of NumPy travel between processes by value; tensors would each hold a file open.
    """

    spec: ShardSpec
    tensor_rank: int
    start: int
    values: Array


@dataclass
class RankRecord:
    """What one rank saw: losses [steps, parts] and norms [steps] of all, and its own pieces."""

    tensor_size: int
    losses: Array
    norms: Array
    outputs: Moments
    initial: list[Piece]
    gradients: list[Piece]
    weights: list[Piece]


@dataclass
class Tensors:
    """Whole tensors by name.

    Attributes:
        values: in the order of the model.
        unequal: of the tensors whose copies on several ranks are not bitwise the same, the norm of
            the largest difference, relative to the tensor's.
    """

    values: dict[str, Array] = field(default_factory=dict)
    unequal: dict[str, float] = field(default_factory=dict)


@dataclass
class Recording:
    """What a training came to.

    Attributes:
        losses: [steps, parts]; norms: [steps], of the gradients before clipping.
        disagreement: the largest relative difference of a loss or a norm between ranks.
        outputs: mean squares of the layers' outputs in the first step, by the layer's weight.
        initial: the weights before the first step.
        gradients: of the first step, before clipping.
        weights: after the last step.
    """

    losses: Array
    norms: Array
    disagreement: float
    outputs: dict[str, float]
    initial: Tensors
    gradients: Tensors
    weights: Tensors


def record(trainer: Trainer, steps: int, batches: Callable[[int, int], list[Batch]]) -> RankRecord:
    """Train ``steps`` steps; every rank must call it.

    ``batches`` gives this rank's micro-batches of a step from the step's number, from 0, and the
    number of samples in its global batch.
    """
    losses, norms = [], []
    initial = _weights(trainer)
    gradients: list[Piece] = []
    for number in range(steps):
        own = batches(number, trainer.ramp.at(trainer.samples))
        if number == 0:
            with watched_outputs(trainer.chunks) as outputs, _before_update(trainer, gradients):
                step = trainer.step(own)
        else:
            step = trainer.step(own)
        losses.append(trainer.over_ranks(step.parts))
        norms.append(step.grad_norm)
    return RankRecord(
        trainer.state.tensor.size,
        _array(torch.stack(losses)),
        _array(torch.stack(norms)),
        outputs,
        initial,
        gradients,
        _weights(trainer),
    )


def _weights(trainer: Trainer) -> list[Piece]:
    rank = trainer.state.tensor.rank
    return [Piece(spec, rank, 0, _array(weight)) for _, weight, spec in trainer.weights]


@contextmanager
def _before_update(trainer: Trainer, gradients: list[Piece]) -> Iterator[None]:
    """Within it, the finished gradients of a step are copied before the update clips them."""
    optimizer = trainer.optimizer
    update = optimizer.step

    def copy_and_update(lr: float) -> StepResult:
        gradients.extend(_gradients(trainer))
        return update(lr)

    optimizer.step = copy_and_update  # type: ignore[method-assign]
    try:
        yield
    finally:
        optimizer.step = update  # type: ignore[method-assign]


def _gradients(trainer: Trainer) -> Iterator[Piece]:
    """What this rank holds of the sums of the gradients, without the loss scale."""
    optimizer, rank = trainer.optimizer, trainer.state.tensor.rank
    for shard in optimizer.gradients.shards:
        for parameter, part, first in shard.parts(shard.gradients):
            yield Piece(shard_spec(parameter), rank, first, _array(part / optimizer.loss_scale))


def _array(tensor: Tensor) -> Array:
    """A copy in float64 where the tensor is, else in float32, which holds all shorter formats."""
    tensor = tensor.detach().to("cpu", copy=True)
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).numpy()


def assemble(ranks: Sequence[RankRecord]) -> Recording:
    """The whole of what the ranks recorded.

    Raises:
        ValueError: parts of a tensor are not numbers, or no rank holds them.
    """
    first, size = ranks[0], ranks[0].tensor_size
    return Recording(
        first.losses,
        first.norms,
        _disagreement(ranks),
        mean_squares(rank.outputs for rank in ranks),
        *(
            _whole([piece for rank in ranks for piece in getattr(rank, what)], size)
            for what in ("initial", "gradients", "weights")
        ),
    )


def _disagreement(ranks: Sequence[RankRecord]) -> float:
    figures = [np.concatenate((rank.losses.ravel(), rank.norms.ravel())) for rank in ranks]
    differences = np.ptp(np.stack(figures), axis=0)
    return float(np.max(differences / (np.abs(figures[0]) + (differences == 0))))


def _whole(pieces: Iterable[Piece], tensor_size: int) -> Tensors:
    result = Tensors()
    differences: dict[str, float] = {}
    for spec, values in _parts(pieces, tensor_size, differences):
        rank, local = values
        target = result.values.setdefault(spec.key, np.full(spec.shape, np.nan, local.dtype))
        for box in spec.rectangles(rank, tensor_size):
            _put(target[box.global_slices], local[box.local_slices], spec.key, differences)
    missing = [name for name, values in result.values.items() if np.isnan(values).any()]
    if missing:
        raise ValueError(f"not a number, or held by no rank: parts of {', '.join(missing)}")
    for name, difference in differences.items():
        result.unequal[name] = difference / (_norm(result.values[name]) or 1.0)
    return result


def _parts(
    pieces: Iterable[Piece], tensor_size: int, differences: dict[str, float]
) -> Iterator[tuple[ShardSpec, tuple[int, Array]]]:
    """The parts of the tensor ranks, put together from stretches."""
    parts: dict[tuple[str, int], tuple[ShardSpec, Array]] = {}
    for spec, rank, start, values in pieces:
        shape = spec.local_shape(tensor_size)
        _, flat = parts.setdefault(
            (spec.key, rank), (spec, np.full(math.prod(shape), np.nan, values.dtype))
        )
        _put(flat[start : start + values.size], values.reshape(-1), spec.key, differences)
    for (_, rank), (spec, flat) in parts.items():
        yield spec, (rank, flat.reshape(spec.local_shape(tensor_size)))


def _put(target: Array, values: Array, name: str, differences: dict[str, float]) -> None:
    """Copy ``values`` where nothing is yet, and compare them with what is there already."""
    held = ~np.isnan(target)
    if held.any() and not np.array_equal(target[held], values[held]):
        found = _norm(target[held] - values[held])
        differences[name] = max(found, differences.get(name, 0.0))
    target[~held] = values[~held]


def _norm(values: Array) -> float:
    return float(np.linalg.norm(values.reshape(-1).astype(np.float64)))
