"""Builds a schedule by playing it out in time: a free rank takes the best of what it can run now.

Zero-bubble and interleaved schedules have no formula that suits every number of ranks and
micro-batches and every cost. They have simple rules, though, and playing a table out under a rule
costs about as much as timing it. So the generators try many rules and keep the best table.

What is given and what is decided:

- Each rank runs its forward passes in a given order, and its backward passes; weight gradients
  follow in the order of the backward passes. Gradients are therefore summed in the same order
  whatever the costs.
- A rank begins a forward pass only if what it holds stays within its limit.
- A rank that has both a forward and a backward pass at hand runs them in turn, or the backward
  pass first.
- Weight gradients fill the time in which nothing has arrived. `Policy` says when one may make a
  backward pass late.

Since whatever runs had its inputs there, a table made in this way cannot deadlock.

This file imports no torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from megatron.pipeline.actions import Action, Kind, Schedule
from megatron.pipeline.simulator import PerStage

Order = Sequence[tuple[int, int]]  # (stage, micro-batch)


@dataclass(frozen=True)
class Orders:
    """The passes of every rank, each in order.

    Attributes:
        placement: the rank of each stage.
        forward: per rank, the (stage, micro-batch) of its forward passes.
        backward: per rank, those of its backward passes.
        split: whether weight gradients are actions of their own.
    """

    placement: tuple[int, ...]
    forward: tuple[Order, ...]
    backward: tuple[Order, ...]
    split: bool


@dataclass(frozen=True)
class Policy:
    """How a free rank chooses.

    Attributes:
        slack: idle time that a rank may gather before a weight gradient makes backward passes late.
        patience: a rank's last backward passes, so many, are not made late by a weight gradient:
            nothing that the ranks before it could fill the delay with will come any more.
        backward_first: whether backward passes have precedence, rather than each kind its turn.
        eager: ranks that begin a forward pass though their first gradient is about to arrive.
    """

    slack: float = 0.0
    patience: int = 0
    backward_first: bool = False
    eager: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Played:
    """A table with what it costs: per rank, the time without work between its first and last."""

    schedule: Schedule
    idle: tuple[float, ...]
    cost: float


@dataclass
class _Rank:
    """Where a rank stands."""

    limit: float
    table: list[Action] = field(default_factory=list)
    begun: float = inf
    free: float = 0.0
    busy: float = 0.0
    forwards: int = 0
    backwards: int = 0
    weights: int = 0
    last_was_forward: bool = False

    @property
    def idle(self) -> float:
        return self.free - self.begun - self.busy if self.table else 0.0


class _Play:
    """One run of the rules."""

    def __init__(
        self,
        orders: Orders,
        costs: PerStage,
        limits: Sequence[float],
        retained: float,
        policy: Policy,
    ) -> None:
        self.orders, self.costs, self.policy, self.retained = orders, costs, policy, retained
        self.ranks = [_Rank(limit) for limit in limits]
        self.last_stage = len(orders.placement) - 1
        # Per stage, when the input of each micro-batch is there, as far as that is known.
        micro_batches = len(orders.forward[orders.placement[0]]) // orders.placement.count(
            orders.placement[0]
        )
        self.activations: list[list[float]] = [[] for _ in orders.placement]
        self.activations[0] = [0.0] * micro_batches
        self.gradients: list[list[float]] = [[] for _ in orders.placement]
        self.backward_time = [
            b if orders.split else b + w for b, w in zip(costs.backward, costs.weight, strict=True)
        ]
        # Times are sums in different orders.
        self.tolerance = 1e-9 * max(*costs.forward, *costs.backward, *costs.weight, 1e-300)
        self.events = [(0.0, rank) for rank in range(len(limits))]

    def run(self) -> Played | None:
        """The finished table; None where the limits leave ranks waiting for one another."""
        while self.events:
            now, index = heapq.heappop(self.events)
            rank = self.ranks[index]
            if now < rank.free - self.tolerance:
                continue
            kind, later = self._choose(index, rank, now)
            if kind is not None:
                self._start(index, rank, kind, now)
            elif later < inf:
                heapq.heappush(self.events, (later, index))
        tables = tuple(tuple(rank.table) for rank in self.ranks)
        wanted = (2 + self.orders.split) * sum(map(len, self.orders.forward))
        if sum(map(len, tables)) < wanted:
            return None
        return Played(
            Schedule(tables, self.orders.placement),
            tuple(rank.idle for rank in self.ranks),
            max(rank.free - rank.begun for rank in self.ranks),
        )

    def _choose(self, index: int, rank: _Rank, now: float) -> tuple[Kind | None, float]:
        """What to run now; where that is nothing, when to look again as far as is known."""
        forward, backward = self._next_forward(index, rank), self._next_backward(index, rank)
        soon = now + self.tolerance
        if forward <= soon and self._holds_back(index, rank, now, backward):
            forward = inf
        if backward <= soon:
            turn = forward > soon or rank.last_was_forward or self.policy.backward_first
            return (Kind.BACKWARD if turn else Kind.FORWARD), now
        if forward <= soon:
            return Kind.FORWARD, now
        later = min(forward, backward)
        if self.orders.split and rank.weights < rank.backwards:
            gap = later - now
            stage = self.orders.backward[index][rank.weights][0]
            late = gap < self.costs.weight[stage] - self.tolerance
            left = len(self.orders.backward[index]) - rank.backwards
            idle = now - rank.begun - rank.busy + gap
            if not late or (left > self.policy.patience and idle > self.policy.slack):
                return Kind.WEIGHT, now
        return None, later

    def _next_forward(self, index: int, rank: _Rank) -> float:
        order = self.orders.forward[index]
        if rank.forwards == len(order):
            return inf
        pending = rank.backwards - rank.weights if self.orders.split else 0
        held = rank.forwards - rank.backwards + self.retained * pending
        if held + 1 > rank.limit + 1e-9:
            return inf
        stage, micro_batch = order[rank.forwards]
        arrived = self.activations[stage]
        return arrived[micro_batch] if micro_batch < len(arrived) else inf

    def _next_backward(self, index: int, rank: _Rank) -> float:
        order = self.orders.backward[index]
        if rank.backwards == len(order):
            return inf
        stage, micro_batch = order[rank.backwards]
        arrived = self.gradients[stage]
        return arrived[micro_batch] if micro_batch < len(arrived) else inf

    def _holds_back(self, index: int, rank: _Rank, now: float, backward: float) -> bool:
        """Whether the rank would rather wait for its first gradient than begin a forward pass."""
        if rank.backwards or index in self.policy.eager or not self.orders.split:
            return False
        stage, _ = self.orders.forward[index][rank.forwards]
        filled = rank.forwards >= len(self.ranks) - index
        return filled and backward < now + self.costs.forward[stage] - self.tolerance

    def _start(self, index: int, rank: _Rank, kind: Kind, now: float) -> None:
        if kind is Kind.FORWARD:
            stage, micro_batch = self.orders.forward[index][rank.forwards]
            rank.forwards += 1
            duration = self.costs.forward[stage]
            target = stage + 1
        elif kind is Kind.BACKWARD:
            stage, micro_batch = self.orders.backward[index][rank.backwards]
            rank.backwards += 1
            duration = self.backward_time[stage]
            target = stage - 1
        else:
            stage, micro_batch = self.orders.backward[index][rank.weights]
            rank.weights += 1
            duration = self.costs.weight[stage]
            target = -1
        rank.begun = min(rank.begun, now)
        rank.busy += duration
        rank.free = now + duration
        rank.table.append(Action(stage, kind, micro_batch))
        if kind is not Kind.WEIGHT:
            rank.last_was_forward = kind is Kind.FORWARD
            self._deliver(stage, kind, target, rank.free)
        heapq.heappush(self.events, (rank.free, index))

    def _deliver(self, stage: int, kind: Kind, target: int, end: float) -> None:
        if target < 0:
            return
        if target > self.last_stage:
            self.gradients[stage].append(end)  # the loss: its own rank looks again at `end`
            return
        placement = self.orders.placement
        holder = placement[target]
        if holder != placement[stage]:
            end += self.costs.communication[stage]
        arrivals = self.activations if kind is Kind.FORWARD else self.gradients
        arrivals[target].append(end)
        heapq.heappush(self.events, (max(end, self.ranks[holder].free), holder))


def play(
    orders: Orders,
    costs: PerStage,
    limits: Sequence[float],
    retained: float = 1.0,
    policy: Policy | None = None,
) -> Played | None:
    """Play out a table; None where the limits leave ranks waiting for one another.

    Args:
        orders: what each rank runs, in which order.
        costs: one entry per stage.
        limits: per rank, the most it may hold, in forward passes.
        retained: share of a forward pass's activations that stays from B to W.
        policy: how a rank chooses.
    """
    return _Play(orders, costs, limits, retained, policy or Policy()).run()
