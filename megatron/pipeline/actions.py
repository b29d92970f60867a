"""A pipeline schedule as data: one tuple of actions per rank.

An action is one piece of work on one micro-batch and prints as `2F0`:

    2F0   forward pass of micro-batch 0 on stage 2
    2B0   its backward pass; only the gradient of the input where a `2W0` stands in the table
    2W0   the gradient of the weights, where a schedule does that by itself

A schedule prints as one line per rank. Two stages and three micro-batches under 1F1B:

    0F0 0F1 0B0 0F2 0B1 0B2
    1F0 1B0 1F1 1B1 1F2 1B2

Stages are numbered along the model; with virtual stages a rank holds several of them, and
`placement` says which rank holds which stage. Nothing but the order on each rank and the inputs of
each action decides when an action may run, so a table can be checked, timed, drawn and executed
without knowing which generator made it.

This file imports no torch.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple


class Kind(StrEnum):
    """What an action computes."""

    FORWARD = "F"
    BACKWARD = "B"
    WEIGHT = "W"


class Action(NamedTuple):
    """One pass of one micro-batch through one stage."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that prints as `text`; raises ValueError where there is none."""
        match = re.fullmatch(r"([0-9]+)([FBW])([0-9]+)", text)
        if match is None:
            raise ValueError(f"{text!r} is no action; expected one like 2F0, 2B0 or 2W0")
        return cls(int(match[1]), Kind(match[2]), int(match[3]))


@dataclass(frozen=True)
class Schedule:
    """The actions of every rank in order, and the rank of every stage.

    Ranks are places along the pipeline, not ranks of the world.
    """

    ranks: tuple[tuple[Action, ...], ...]
    placement: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        """Number of ranks along the pipeline."""
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        """Number of stages, virtual ones included."""
        return len(self.placement)

    @cached_property
    def actions(self) -> frozenset[Action]:
        """Every action of the table."""
        return frozenset(action for table in self.ranks for action in table)

    @cached_property
    def num_micro_batches(self) -> int:
        """Number of micro-batches of a step."""
        return 1 + max((action.micro_batch for action in self.actions), default=-1)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that `rank` holds, in the model's order."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == rank)

    def is_split(self, action: Action) -> bool:
        """Whether the weight gradients of the action's micro-batch are an action of their own."""
        return action._replace(kind=Kind.WEIGHT) in self.actions

    def inputs(self, action: Action) -> tuple[Action, ...]:
        """The actions whose results `action` needs."""
        stage, kind, micro_batch = action
        if kind is Kind.WEIGHT:
            return (Action(stage, Kind.BACKWARD, micro_batch),)
        if kind is Kind.FORWARD:
            return (Action(stage - 1, kind, micro_batch),) if stage > 0 else ()
        forward = Action(stage, Kind.FORWARD, micro_batch)
        if stage == self.num_stages - 1:
            return (forward,)
        return (forward, Action(stage + 1, kind, micro_batch))

    def forward_only(self) -> Schedule:
        """The forward passes alone, in the same order, as evaluation runs them."""
        kept = (tuple(a for a in table if a.kind is Kind.FORWARD) for table in self.ranks)
        return Schedule(tuple(kept), self.placement)

    def __str__(self) -> str:
        return format_schedule(self)


class DeadlockError(ValueError):
    """Ranks that wait for one another; `waiting` holds each blocked action and what it needs."""

    def __init__(self, schedule: Schedule, waiting: tuple[tuple[Action, Action], ...]) -> None:
        self.waiting = waiting
        holder = schedule.placement
        waits = []
        for action, needed in waiting:
            known = needed in schedule.actions
            whose = f"of rank {holder[needed.stage]}" if known else "which no rank runs"
            waits.append(f"rank {holder[action.stage]} waits at {action} for {needed} {whose}")
        super().__init__("the schedule deadlocks: " + ", ".join(waits))


def in_dependency_order(
    schedule: Schedule, inputs: Callable[[Action], Iterable[Action]] | None = None
) -> Iterator[tuple[int, Action]]:
    """Every action with its rank, after its inputs and after what stands before it on its rank.

    `inputs` says what an action waits for, where that is more than the schedule's own inputs.

    Raises:
        DeadlockError: no such order exists.
    """
    inputs = inputs or schedule.inputs
    done: set[Action] = set()
    position = [0] * schedule.num_ranks
    waiters: dict[Action, list[int]] = {}
    runnable = deque(range(schedule.num_ranks))
    while runnable:
        rank = runnable.popleft()
        table = schedule.ranks[rank]
        while position[rank] < len(table):
            action = table[position[rank]]
            missing = next((i for i in inputs(action) if i not in done), None)
            if missing is not None:
                waiters.setdefault(missing, []).append(rank)
                break
            yield rank, action
            done.add(action)
            position[rank] += 1
            runnable.extend(waiters.pop(action, ()))
    heads = {
        rank: table[position[rank]]
        for rank, table in enumerate(schedule.ranks)
        if position[rank] < len(table)
    }
    if heads:
        needed = {rank: missing for missing, ranks in waiters.items() for rank in ranks}
        raise DeadlockError(schedule, _circle(schedule, heads, needed))


def _circle(
    schedule: Schedule, heads: dict[int, Action], needed: dict[int, Action]
) -> tuple[tuple[Action, Action], ...]:
    """The waits that lead from one blocked rank to the next until they close or end nowhere."""
    path: list[int] = []
    rank = min(heads)
    while rank not in path:
        path.append(rank)
        if needed[rank] not in schedule.actions:
            return ((heads[rank], needed[rank]),)
        rank = schedule.placement[needed[rank].stage]
    return tuple((heads[rank], needed[rank]) for rank in path[path.index(rank) :])


def validate(schedule: Schedule) -> None:
    """Prove that a training step can run by this table.

    Every micro-batch must pass forward and backward exactly once through every stage, each action
    on the rank that holds its stage, and no rank may wait for ever.

    Raises:
        ValueError: names the first action that is missing, repeated or misplaced.
        DeadlockError: names the actions that wait for one another.
    """
    stages, micro_batches = schedule.num_stages, schedule.num_micro_batches
    if not stages or not micro_batches:
        raise ValueError("the schedule is empty")
    seen: set[Action] = set()
    for rank, table in enumerate(schedule.ranks):
        for action in table:
            if action.stage >= stages or schedule.placement[action.stage] != rank:
                raise ValueError(f"{action} stands on rank {rank}, which does not hold its stage")
            if action in seen:
                raise ValueError(f"{action} stands in the schedule twice")
            seen.add(action)
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        for stage in range(stages):
            for micro_batch in range(micro_batches):
                if (action := Action(stage, kind, micro_batch)) not in seen:
                    raise ValueError(f"{action} is missing from the schedule")
    deque(in_dependency_order(schedule), maxlen=0)


def format_schedule(schedule: Schedule) -> str:
    """The table as text, one line per rank."""
    return "\n".join(" ".join(map(str, table)) for table in schedule.ranks)


def parse_schedule(text: str) -> Schedule:
    """The schedule that prints as `text`, one line per rank; a stage is where its actions stand.

    Raises:
        ValueError: names the line with a word that is no action, a stage that stands on two
            ranks, or a stage that stands on none.
    """
    ranks = []
    holder: dict[int, int] = {}
    for rank, line in enumerate(text.strip().splitlines()):
        try:
            ranks.append(tuple(map(Action.parse, line.split())))
        except ValueError as error:
            raise ValueError(f"line {rank + 1}: {error}") from None
        for action in ranks[-1]:
            if holder.setdefault(action.stage, rank) != rank:
                raise ValueError(
                    f"line {rank + 1}: {action} stands on rank {rank}, "
                    f"but stage {action.stage} is on rank {holder[action.stage]}"
                )
    for stage in range(len(holder)):
        if stage not in holder:
            raise ValueError(f"stage {stage} has no actions, but stage {max(holder)} has")
    return Schedule(tuple(ranks), tuple(holder[stage] for stage in range(len(holder))))
