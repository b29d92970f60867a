"""Times any schedule: when each action runs, the idle share, the activations held.

The model of arXiv 2401.10241: an action starts as soon as its rank is free and its inputs are
there; a message between stages on two ranks arrives `communication` after the action that made it
ends and keeps neither rank busy. The time of a step is the largest, over ranks, from the start of
its first action to the end of its last.

A backward pass that is not split costs `backward + weight`. With `T` the sum of the three costs
and `m` micro-batches, the bubble of a pipeline of equal stages is 1 - m T / step time.

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
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
    """

    forward: Cost
    backward: Cost
    weight: Cost = 0.0
    communication: Cost = 0.0

    def per_stage(self, stages: int) -> PerStage:
        """Each cost as a tuple with one entry per stage.

        Raises:
            ValueError: a cost is negative, or does not have one entry per stage.
        """
        return PerStage(**{f.name: self._expanded(f.name, stages) for f in fields(self)})

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
        peak_activations: per rank, the most forward passes whose activations it holds at once.
    """

    spans: dict[Action, Span]
    cost: float
    bubble: float
    peak_activations: tuple[int, ...]


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
            _peak_activations(schedule, rank) for rank in range(schedule.num_ranks)
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


def _peak_activations(schedule: Schedule, rank: int) -> int:
    """A rank runs one action after another, so the order alone says how much it holds."""
    held = peak = 0
    for action in schedule.ranks[rank]:
        if action.kind is Kind.FORWARD:
            held += 1
        elif action.kind is Kind.WEIGHT or not schedule.is_split(action):
            held -= 1
        peak = max(peak, held)
    return peak
