"""What a rank sends, receives and waits for, worked out from the schedule before the first step.

A message carries the result of one action to an action of a neighbouring stage. Every directed
edge between two ranks has a communicator for activations and one for gradients, and messages on
one communicator are taken in the order they were sent, so both sides must name them in the same
order: `compile_steps` checks that for the whole schedule.

In training a rank never waits for a send that might still be under way. A send is over once its
receiver has taken the message, and the schedule says when that is certain: before the first later
action of the sender that follows, through a chain of messages, the action that consumed it. There
the sent tensor is let go. Two stages under 1F1B, rank 0: the activation of `0F0` is surely
delivered when `0B0` has its gradient, for that gradient was made by `1B0`, which came after `1F0`.

In evaluation nothing ever comes back. There a rank keeps only a few sends open and waits for the
oldest before it makes another; `_open_sends` finds how few cannot stop the pipeline.

This file imports no torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from megatron.pipeline.actions import Action, DeadlockError, Kind, Schedule, in_dependency_order

# Receives are posted when their action is at most this many actions ahead. Under 1F1B a rank
# receives activations and gradients in turn, or only one of them every second action: 2 keeps one
# receive open ahead of the current action in both cases, and bounds the buffers held for them.
ACTIONS_AHEAD = 2

# By how many stages a result goes on.
_NEXT_STAGE = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.WEIGHT: 0}


class Edge(NamedTuple):
    """A communicator: what it carries, from which to which rank of the pipeline."""

    kind: Kind
    source: int
    target: int


class Message(NamedTuple):
    """The result of `producer`, as input of `consumer`; both on one rank where edge is a loop."""

    edge: Edge
    producer: Action
    consumer: Action

    @property
    def is_local(self) -> bool:
        """Whether both stages are on one rank, so that nothing is communicated."""
        return self.edge.source == self.edge.target

    def __str__(self) -> str:
        what = "activation" if self.edge.kind is Kind.FORWARD else "gradient"
        return f"the {what} of micro-batch {self.producer.micro_batch}"


@dataclass(frozen=True)
class Step:
    """One action of a rank and the messages around it.

    Attributes:
        action: what to compute.
        post: receives to open before anything else, in order.
        received: the input; None where the stage is the first (last) of the model.
        delivered: messages sent earlier that are let go before the action computes: in training
            they have certainly arrived once the input has, in evaluation they are waited for.
        sent: where the result goes; None where the stage is the last (first).
    """

    action: Action
    post: tuple[Message, ...]
    received: Message | None
    delivered: tuple[Message, ...]
    sent: Message | None


def compile_steps(schedule: Schedule, rank: int) -> tuple[Step, ...]:
    """The steps of `rank`, a place along the pipeline, by a valid schedule or its forward passes.

    Raises:
        ValueError: a receiver takes the messages of an edge in another order than they are sent.
    """
    return compile_ranks(schedule, (rank,))[0]


def compile_ranks(schedule: Schedule, ranks: Iterable[int]) -> list[tuple[Step, ...]]:
    """The steps of several ranks at once, as :func:`compile_steps` gives those of one."""
    sent = _messages(schedule)
    taken = {message.consumer: message for message in sent.values()}
    _check_order(schedule, sent, taken)
    outputs = {rank: [sent.get(action) for action in schedule.ranks[rank]] for rank in ranks}
    delivered = _deliveries(schedule, outputs)
    return [_steps(schedule.ranks[rank], taken, outputs[rank], delivered[rank]) for rank in outputs]


def _steps(
    table: Sequence[Action],
    taken: Mapping[Action, Message],
    outputs: Sequence[Message | None],
    delivered: Mapping[int, list[Message]],
) -> tuple[Step, ...]:
    inputs = [taken.get(action) for action in table]
    posts: dict[int, list[Message]] = defaultdict(list)
    for index, message in enumerate(inputs):
        if message is not None and not message.is_local:
            posts[max(0, index - ACTIONS_AHEAD)].append(message)
    return tuple(
        Step(action, tuple(posts[i]), inputs[i], tuple(delivered.get(i, ())), outputs[i])
        for i, action in enumerate(table)
    )


def _messages(schedule: Schedule) -> dict[Action, Message]:
    """The message that each action ends with; no entry where the schedule has none to take it."""
    made = {}
    for action in schedule.actions:
        step = _NEXT_STAGE[action.kind]
        consumer = action._replace(stage=action.stage + step)
        if step and consumer in schedule.actions:
            made[action] = _message(schedule, action, consumer)
    return made


def edges(schedule: Schedule) -> tuple[Edge, ...]:
    """The communicators that the schedule uses, in an order that all ranks agree on."""
    messages = _over_the_wire(_messages(schedule).values())
    return tuple(sorted({message.edge for message in messages}))


def check_order(schedule: Schedule) -> None:
    """Check that each edge's receiver takes messages in the order in which they are sent.

    Raises:
        ValueError: names the two messages that change places.
    """
    sent = _messages(schedule)
    _check_order(schedule, sent, {message.consumer: message for message in sent.values()})


def _check_order(
    schedule: Schedule, sent: Mapping[Action, Message], taken: Mapping[Action, Message]
) -> None:
    senders: dict[Edge, list[Message]] = defaultdict(list)
    receivers: dict[Edge, list[Message]] = defaultdict(list)
    for action in chain.from_iterable(schedule.ranks):
        for by_edge, message in ((senders, sent.get(action)), (receivers, taken.get(action))):
            if message is not None and not message.is_local:
                by_edge[message.edge].append(message)
    for edge, messages in senders.items():
        for first, other in zip(messages, receivers[edge], strict=True):
            if first != other:
                raise ValueError(
                    f"rank {edge.source} sends the result of {first.producer} when rank "
                    f"{edge.target} wants that of {other.producer}: messages of one edge must be "
                    "taken in the order they are sent"
                )


def _message(schedule: Schedule, producer: Action, consumer: Action) -> Message:
    holder = schedule.placement
    edge = Edge(producer.kind, holder[producer.stage], holder[consumer.stage])
    return Message(edge, producer, consumer)


def _deliveries(
    schedule: Schedule, outputs: Mapping[int, list[Message | None]]
) -> dict[int, dict[int, list[Message]]]:
    """For each rank and each of its actions by index: the messages let go when it begins.

    `outputs` are the messages of the ranks in question, action by action. Those that no action
    knows to have arrived stand past the last index, or nowhere.
    """
    place = {action: i for table in schedule.ranks for i, action in enumerate(table)}
    delivered: dict[int, dict[int, list[Message]]] = {r: defaultdict(list) for r in outputs}
    away = {rank: _over_the_wire(messages) for rank, messages in outputs.items()}
    if all(action.kind is Kind.FORWARD for action in schedule.actions):
        limit = _open_sends(schedule)
        for rank, messages in away.items():
            for message, next_producer in _waits(messages, limit):
                delivered[rank][place[next_producer]].append(message)
        return delivered
    targets = {
        rank: {message.edge.target for message in messages} for rank, messages in away.items()
    }
    begun = _begun_before(schedule, targets)
    for rank, messages in away.items():
        for message in messages:
            begun_there = begun[rank][message.edge.target]
            later = place[message.producer] + 1
            at = bisect_right(begun_there, place[message.consumer], later)
            delivered[rank][at].append(message)
    return delivered


def _over_the_wire(messages: Iterable[Message | None]) -> list[Message]:
    return [message for message in messages if message is not None and not message.is_local]


def _waits(sent: list[Message], limit: int) -> Iterator[tuple[Message, Action]]:
    """Each message with the action before which it must be delivered to keep `limit` open."""
    return ((message, later.producer) for message, later in zip(sent, sent[limit:], strict=False))


def _open_sends(schedule: Schedule) -> int:
    """How many sends a rank may keep open so that waiting for the oldest never stops the pipeline.

    Two suffice where each rank holds one stage. Where an edge closes a ring of virtual stages, the
    sender may have to be further ahead, which is tried out: enough are always safe.
    """
    messages = _messages(schedule)
    tables = [_over_the_wire(map(messages.get, table)) for table in schedule.ranks]
    limit = 2
    while awaited := {
        producer: message.consumer for sent in tables for message, producer in _waits(sent, limit)
    }:
        try:
            _prove_order(schedule, awaited)
        except DeadlockError:
            limit *= 2
        else:
            break
    return limit


def _prove_order(schedule: Schedule, awaited: dict[Action, Action]) -> None:
    def inputs(action: Action) -> tuple[Action, ...]:
        extra = (awaited[action],) if action in awaited else ()
        return (*schedule.inputs(action), *extra)

    deque(in_dependency_order(schedule, inputs), maxlen=0)


def _begun_before(
    schedule: Schedule, targets: Mapping[int, set[int]]
) -> dict[int, dict[int, list[int]]]:
    """For each rank, its targets and its actions: how many of the target's have begun by then.

    Counted are those that have begun for certain. An action knows what the actions that made its
    inputs knew, and what the one before it on its rank knew, so the figures never fall.
    """
    peers = sorted(set().union(*targets.values()))
    column = {peer: i for i, peer in enumerate(peers)}
    # A row of figures, one for each peer: what a rank's last action knows, and what each knew.
    known = [(0,) * len(peers)] * schedule.num_ranks
    at: dict[Action, tuple[int, ...]] = {}
    begun: dict[int, dict[int, list[int]]] = {
        rank: {target: [] for target in own} for rank, own in targets.items()
    }
    for holder, action in in_dependency_order(schedule) if peers else ():
        row = known[holder]
        for needed in schedule.inputs(action):
            row = tuple(map(max, row, at[needed]))
        for target, counts in begun.get(holder, {}).items():
            counts.append(row[column[target]])
        if holder in column:
            own = column[holder]
            row = (*row[:own], row[own] + 1, *row[own + 1 :])
        known[holder] = at[action] = row
    return begun
