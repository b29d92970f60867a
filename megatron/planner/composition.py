"""The rank of any layout, put together from the records of a model's parts.

A stage does what its parts do, one behind the other: their operators, their messages less those
between them, their bytes. What depends on the ranks is changed: who belongs to a group, the share
of the optimizer that a data-parallel rank has, what streamed gradients add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from megatron.config import Config
from megatron.mpu import Stage, Topology
from megatron.pipeline.actions import Kind
from megatron.planner.layouts import Layout
from megatron.planner.recording import Key, RankRecord, Segment
from megatron.planner.timing import ALL_STAGES, FIRST, LAST, MIDDLE
from megatron.planner.trace import Communication, Event, Operation, Trace, Wait

Parts = Mapping[str, RankRecord]

# Data-parallel ranks of a recording, so that it has all that these communicate.
REPLICAS = 2
# Streamed gradients: a piece is set to zero, then read and written beside autograd's gradient; of
# its sums a rank's share is read, and read and written where they are added up.
PASSES_TO_FILL, PASSES_TO_ADD = 3.5, 3
# Communications of one part are fewer, so that parts can number theirs from a multiple of it on.
NUMBERS = 1 << 20

ONE_STACK = ("first", "layer", "last")
# Parts that hold the word embedding; on one rank those behind the first share its.
WITH_EMBEDDING = ("first", "begins_decoder", "last")


def part_names(own: Sequence[Stage]) -> list[list[str]]:
    """The parts of each of a rank's stages, in the order of its forward pass.

    "shared_" stands before those that find their word embedding in a part before them.
    """
    found, has_embedding = list[list[str]](), False
    for stage in own:
        found.append([])
        for name in _part_names(stage):
            is_shared = has_embedding and name in WITH_EMBEDDING
            has_embedding |= name in WITH_EMBEDDING
            found[-1].append(f"shared_{name}" if is_shared else name)
    return found


def _part_names(stage: Stage) -> list[str]:
    two_stacks = stage.split is not None
    return [
        *["first"] * stage.is_first,
        *_in_a_row("layer", stage.num_layers, two_stacks),
        *["ends_encoder"] * (two_stacks and stage.ends_encoder),
        *["begins_decoder"] * stage.begins_decoder,
        *_in_a_row("decoder_layer", stage.num_decoder_layers, two_stacks),
        *["last"] * stage.is_last,
    ]


def _in_a_row(name: str, count: int, two_stacks: bool) -> list[str]:
    return [name, *[f"next_{name}" if two_stacks else name] * (count - 1)] if count else []


class Composition:
    """The ranks of one layout."""

    def __init__(
        self,
        parts: Parts,
        layout: Layout,
        topology: Topology,
        stages: Sequence[Stage],
    ) -> None:
        self._topology, self._stages = topology, stages
        self._is_spread = layout.use_distributed_optimizer
        self._streams = layout.shard_gradients
        self._is_split = layout.pipeline_schedule.startswith("zb")
        # What the update works on, against the recording.
        self._shard = REPLICAS / topology.data if self._is_spread else float(REPLICAS)
        self._parts = parts
        self._limit = 0
        hidden = parts["first"].messages
        self._messages = {s.index: hidden[_hidden_of(s, len(hidden))] for s in stages}

    def rank(self, place: int) -> RankRecord:
        """The record of a rank of the pipeline."""
        topology = self._topology
        own = [stage for stage in self._stages if stage.index % topology.pipeline == place]
        held = [[self._parts[name] for name in inside] for inside in part_names(own)]
        everything = list(chain.from_iterable(held))
        groups = _groups(topology, place)
        self._limit = self._pieces(everything)
        actions: dict[Key, Segment] = {}
        begun = 0
        for index, (stage, parts) in enumerate(zip(own, held, strict=True)):
            numbered = [((begun + i) * NUMBERS, part) for i, part in enumerate(parts)]
            begun += len(parts)
            kinds = (Kind.FORWARD, Kind.BACKWARD, *[Kind.WEIGHT] * self._is_split)
            for kind in kinds:
                for at in (FIRST, MIDDLE, LAST):
                    segment = self._action(stage, numbered, kind, at)
                    trace = tuple(_regrouped(event, groups) for event in segment.trace)
                    actions[index, kind, at] = replace(segment, trace=trace)
        weights, gradients, optimizer = (
            sum(getattr(part, name) for part in everything)
            for name in ("weights", "gradients", "optimizer")
        )
        shared = 1 / topology.data if self._streams else 1.0
        return replace(
            everything[0],
            actions=actions,
            before=Segment(self._before(everything, groups), 0, 0),
            after=Segment(self._after(everything, groups), 0, 0),
            parameters=sum(part.parameters for part in everything),
            weights=weights,
            gradients=round(gradients * shared),
            optimizer=round(optimizer * self._shard),
            rest=sum(part.rest for part in everything) + self._limit,
            messages=self._messages,
            batch=max(part.batch for part in everything),
        )

    def _action(
        self, stage: Stage, numbered: Sequence[tuple[int, RankRecord]], kind: Kind, at: str
    ) -> Segment:
        """One part after another, and the hidden states between them."""
        is_forward = kind is Kind.FORWARD
        seen = at if not self._streams or is_forward else LAST
        trace: list[Event] = []
        change = peak = 0
        # A hidden state within a stage is held; between stages it is a message, counted as such.
        inner = self._messages[stage.index] * (
            0 if kind is Kind.WEIGHT else 1 if is_forward else -1
        )
        order = numbered if is_forward else numbered[::-1]
        for place, (offset, part) in enumerate(order):
            segment = part.actions[0, kind, seen]
            trace += (
                _renumbered(event, offset)
                for event in segment.trace
                if not (isinstance(event, Communication) and event.group == "pipeline")
            )
            peak = max(peak, change + segment.peak)
            change += segment.change + (inner if place + 1 < len(order) else 0)
        peak = max(peak, change)
        trace = list(map(self._summed, trace))
        if self._streams and kind is Kind.BACKWARD:
            trace = _streamed(trace, self._limit, self._topology.data)
        step = 1 if is_forward else -1
        to = stage.index + step
        if kind is not Kind.WEIGHT and 0 <= to < len(self._stages):
            size = self._messages[min(stage.index, to)]
            ranks = self._topology.pipeline_groups()[0]
            pair = sorted(ranks[index % len(ranks)] for index in (stage.index, to))
            trace.append(Communication("send", "pipeline", tuple(pair), size, -1))
        return Segment(tuple(trace), change, peak)

    def _summed(self, event: Event) -> Event:
        """Whole gradients are summed by an all-reduce."""
        is_sum = isinstance(event, Communication) and event.group == "data"
        if is_sum and isinstance(event, Communication) and not self._is_spread:
            return replace(event, kind="all-reduce")
        return event

    def _before(self, parts: Sequence[RankRecord], groups: Mapping[str, tuple[int, ...]]) -> Trace:
        merged = _merged(parts, lambda part: part.before.trace, 1.0)
        return tuple(_regrouped(event, groups) for event in merged)

    def _after(self, parts: Sequence[RankRecord], groups: Mapping[str, tuple[int, ...]]) -> Trace:
        """Waits for the sums, the update of all parts at once, and their parameters sent on."""
        sums, sent = list[Event](), list[Event]()
        for index, part in enumerate(parts):
            for event in part.after.trace:
                if isinstance(event, Wait):
                    sums.append(_renumbered(event, index * NUMBERS))
                elif isinstance(event, Communication) and event.group == "data":
                    sent.append(_renumbered(event, index * NUMBERS))
        update = _merged(parts, _update_of, self._shard)
        if not self._is_spread:
            sent = []
        return tuple(_regrouped(event, groups) for event in (*sums, *update, *sent))

    def _pieces(self, parts: Sequence[RankRecord]) -> int:
        """Bytes in which streamed gradients pass: twice the largest piece, or all of them."""
        if not self._streams:
            return 0
        sizes = [
            event.bytes
            for part in parts
            for event in part.actions[0, Kind.BACKWARD, LAST].trace
            if isinstance(event, Communication) and event.group == "data"
        ]
        return min(2 * max(sizes), sum(sizes))


def _hidden_of(stage: Stage, recorded: int) -> int:
    """The stage of the recording that sends on as much as this one."""
    return recorded - 2 if stage.has_decoder and recorded > len(ONE_STACK) else 0


@dataclass(frozen=True)
class Embedding:
    """The word embedding: its elements, and the bytes of them on each tensor rank."""

    elements: int
    bytes: int

    @classmethod
    def of(cls, config: Config, tensor: int) -> Embedding:
        """That of a model on so many tensor ranks."""
        model = config.model
        elements = model.padded_vocab_size(tensor) * model.hidden_size
        return cls(elements, elements // tensor * getattr(torch, model.dtype).itemsize)


def without_copy(part: RankRecord, embedding: Embedding) -> RankRecord:
    """A part whose word embedding is a copy, on a rank that has the embedding anyway."""
    is_copy = part.weights >= embedding.bytes and part.parameters < embedding.elements
    own = 1 - embedding.bytes / part.weights if is_copy else 1.0

    def shrunk(event: Event) -> Event:
        if isinstance(event, Communication) and event.group in ("data", "embedding"):
            return replace(event, bytes=round(own * event.bytes))
        return event

    def segment(each: Segment, factor: float) -> Segment:
        return replace(each, trace=tuple(_scaled(shrunk(event), factor) for event in each.trace))

    return replace(
        part,
        actions={key: segment(each, 1.0) for key, each in part.actions.items()},
        before=segment(part.before, own),
        after=segment(part.after, own),
        weights=round(own * part.weights),
        gradients=round(own * part.gradients),
        optimizer=round(own * part.optimizer),
    )


def _groups(topology: Topology, place: int) -> dict[str, tuple[int, ...]]:
    """The groups of a rank of the pipeline, of tensor rank 0 and data rank 0."""
    rank = topology.rank(pipeline=place, data=0, tensor=0)
    found = {
        "tensor": topology.tensor_groups(),
        "data": topology.data_groups(),
        "model": topology.model_groups(),
        "embedding": topology.embedding_groups(),
        "position-embedding": topology.position_embedding_groups(),
        "world": (tuple(range(topology.world_size)),),
    }
    return {
        name: next((group for group in groups if rank in group), ())
        for name, groups in found.items()
    }


def _regrouped(event: Event, groups: Mapping[str, tuple[int, ...]]) -> Event:
    if isinstance(event, Communication) and event.group != "pipeline":
        return replace(event, ranks=groups[event.group])
    return event


def _renumbered(event: Event, offset: int) -> Event:
    return event if isinstance(event, Operation) else replace(event, number=event.number + offset)


def _scaled(event: Event, factor: float) -> Event:
    if isinstance(event, Operation):
        return replace(event, bytes=round(factor * event.bytes))
    return event


def _update_of(part: RankRecord) -> Trace:
    """What a part does at the end of a step, but for its gradients and parameters on their way."""
    own = {e.number for e in part.after.trace if isinstance(e, Communication) and e.group != "data"}
    return tuple(
        event for event in part.after.trace if isinstance(event, Operation) or event.number in own
    )


def _merged(
    parts: Sequence[RankRecord], trace_of: Callable[[RankRecord], Trace], factor: float
) -> Iterator[Event]:
    """The traces of all parts, each operator once over all parts that are alike.

    Where all stages or all replicas meet, they do so once.
    """
    counts: dict[int, tuple[RankRecord, int]] = {}
    for part in parts:
        counts[id(part)] = part, counts.get(id(part), (part, 0))[1] + 1
    alone, together = list[Event](), list[Event]()
    for place, (part, count) in enumerate(counts.values()):
        has_met = False
        for event in trace_of(part):
            is_meeting = isinstance(event, Communication) and event.group in (*ALL_STAGES, "data")
            if is_meeting:
                has_met = True
            if isinstance(event, Operation):
                event = _scaled(event, count * factor)
            elif isinstance(event, Communication) and not is_meeting:
                event = replace(event, bytes=round(event.bytes * count * factor))
            elif place and has_met:
                continue
            (together if has_met else alone).append(_renumbered(event, -(place + 1) * NUMBERS))
    return chain(alone, together)


def _streamed(trace: Iterable[Event], limit: int, replicas: int) -> list[Event]:
    """A backward pass whose gradients pass through pieces that hold no more than `limit` bytes.

    A piece is set to zero and filled with what autograd has found; its sums are added to those of
    the micro-batches before.
    """
    found: list[Event] = []
    under_way: list[Communication] = []
    for event in trace:
        if isinstance(event, Communication) and event.group == "data":
            while under_way and sum(each.bytes for each in under_way) + event.bytes > limit:
                found.append(Wait(under_way.pop(0).number))
            moved = round(event.bytes * (PASSES_TO_FILL + PASSES_TO_ADD / replicas))
            found.append(Operation("aten.add_", "memory", 0.0, moved))
            under_way.append(event)
        found.append(event)
    return found
