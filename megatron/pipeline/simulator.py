"""Times any schedule: when each action runs, the idle share, the activations held.

The model of arXiv 2401.10241: an action starts as soon as its rank is free and its inputs are
there; a message between stages on two ranks arrives `communication` after the action that made it
ends and keeps neither rank busy. The time of a step is the largest, over ranks, from the start of
its first action to the end of its last.

A backward pass that is not split costs `backward + weight`. With `T` the sum of the three costs
and `m` micro-batches, the bubble of a pipeline of equal stages is 1 - m T / step time. The next
step may begin on each rank as soon as this one has ended there: steps of this length tile.

Memory is counted in forward passes held. What a forward pass leaves is 1 from F to B. Where B is
split, the inputs of the weights' products and the gradients of their outputs stay until W:
`Costs.retained` of it. In a transformer layer these are 32 bytes of the 34 + 5 a s / h that a
forward pass leaves for each element (arXiv 2205.05198): 0.94 with fused attention, which does not
keep the a s / h; 0.37 to 0.43 without, in the models of arXiv 2401.10241. With virtual stages a
forward pass is that of one chunk.

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron.pipeline.actions import Action, Kind, Schedule, in_dependency_order

Cost = float | Sequence[float]


@dataclass(frozen=True)
class Costs:
    """Times of one micro-batch on one stage, in any one unit; a sequence gives one per stage.

    Attributes:
        forward: the forward pass.
        backward: the gradient of the input.
        weight: the gradient of the weights.
        communication: a message that the stage sends to a stage on another rank.
        retained: the share of a forward pass's activations that stays from B to W, from 0 to 1.
    """

    forward: Cost
    backward: Cost
    weight: Cost = 0.0
    communication: Cost = 0.0
    retained: float = 1.0

    def per_stage(self, stages: int) -> PerStage:
        """Each cost as a tuple with one entry per stage.

        Raises:
            ValueError: a cost is negative, or does not have one entry per stage, or `retained` is
                no share.
        """
        if not 0 <= self.retained <= 1:
            raise ValueError(f"retained must be from 0 to 1, found {self.retained}")
        return PerStage(*(self._expanded(name, stages) for name in PerStage._fields))

    def _expanded(self, name: str, stages: int) -> tuple[float, ...]:
        cost: Cost = getattr(self, name)
        values = tuple(cost) if isinstance(cost, Sequence) else (cost,) * stages
        if len(values) != stages:
            raise ValueError(f"{name} costs of {len(values)} stages given, expected {stages}")
        if min(values) < 0:
            raise ValueError(f"{name} cost must not be negative, found {min(values)}")
        return values


class PerStage(NamedTuple):
    """The costs of `Costs`, one entry per stage each."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    communication: tuple[float, ...]


class Span(NamedTuple):
    """When an action starts and ends."""

    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What a schedule costs.

    Attributes:
        spans: start and end of every action, the first action starting at 0.
        cost: time of a step, in the unit of the costs.
        bubble: share of `cost` in which the ranks, on average, have nothing to do.
        peak_activations: per rank, the most that it holds at once, in forward passes.
    """

    spans: dict[Action, Span]
    cost: float
    bubble: float
    peak_activations: tuple[float, ...]


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Time `schedule`.

    Raises:
        ValueError: the costs do not fit the schedule's stages.
        DeadlockError: names the actions that wait for one another.
    """
    spans = _spans(schedule, costs.per_stage(schedule.num_stages))
    lasting = [spans[t[-1]].end - spans[t[0]].start for t in schedule.ranks if t]
    cost = max(lasting, default=0.0)
    busy = sum(span.end - span.start for span in spans.values())
    return Simulation(
        spans=spans,
        cost=cost,
        bubble=1 - busy / (cost * schedule.num_ranks) if cost else 0.0,
        peak_activations=tuple(
            _peak_activations(schedule, rank, costs.retained) for rank in range(schedule.num_ranks)
        ),
    )


def _spans(schedule: Schedule, costs: PerStage) -> dict[Action, Span]:
    spans: dict[Action, Span] = {}
    free = [0.0] * schedule.num_ranks
    for rank, action in in_dependency_order(schedule):
        arrivals = (
            spans[needed].end
            + (costs.communication[needed.stage] if schedule.placement[needed.stage] != rank else 0)
            for needed in schedule.inputs(action)
        )
        start = max(free[rank], *arrivals, 0.0)
        free[rank] = start + _duration(schedule, action, costs)
        spans[action] = Span(start, free[rank])
    return spans


def _duration(schedule: Schedule, action: Action, costs: PerStage) -> float:
    match action.kind:
        case Kind.FORWARD:
            return costs.forward[action.stage]
        case Kind.WEIGHT:
            return costs.weight[action.stage]
        case Kind.BACKWARD:
            weight = 0.0 if schedule.is_split(action) else costs.weight[action.stage]
            return costs.backward[action.stage] + weight


def _peak_activations(schedule: Schedule, rank: int, retained: float) -> float:
    """A rank runs one action after another, so the order alone says how much it holds."""
    peak = 0.0
    whole = partial = 0
    for action in schedule.ranks[rank]:
        match action.kind:
            case Kind.FORWARD:
                whole += 1
            case Kind.BACKWARD:
                whole -= 1
                partial += schedule.is_split(action)
            case Kind.WEIGHT:
                partial -= 1
        peak = max(peak, whole + retained * partial)
    return peak
