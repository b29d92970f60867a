"""Any layout of a model, put together from what a few of its parts were seen to do.

A full recording takes seconds, and a search asks for thousands of layouts. These differ less than
it seems: a stage does what its layers and ends do, one after another. So a pipeline is recorded in
which each stage is one part: the embedding alone, one layer alone, the heads alone, of an
encoder-decoder also the encoder's end, the decoder's embedding and a decoder's layer. The record of
a stage of n layers is that of a layer n times, with the ends around it.

    recorded    tensor size, sequence parallelism, recomputation, split backward passes, and
                micro-batches of 1, 2 and 4 samples; from the last two those of more follow, since
                every size of an operator is linear in the samples
    changed     the ranks of all groups, and by the number of data-parallel ranks the share of the
                optimizer that each of them has

A `Recorded` made so goes through `dry_run.put_together` like a real one. It leaves out what is
small, and is right only about layers that are recomputed one by one; so it ranks layouts, and a
real dry run says what they cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from megatron.config import Config
from megatron.mpu import Stage, Topology
from megatron.pipeline.actions import Kind
from megatron.planner.dry_run import Recorded, record
from megatron.planner.layouts import Layout
from megatron.planner.recording import Key, RankRecord, Segment
from megatron.planner.timing import ALL_STAGES, FIRST, LAST, MIDDLE
from megatron.planner.trace import Communication, Event, Operation, Trace, Wait
from megatron.training.initialize import rank_grid
from megatron.training.task import Task

# Data-parallel ranks of a recording, so that it has all that these communicate.
REPLICAS = 2
# Streamed gradients: a piece is set to zero, then read and written beside autograd's gradient; of
# its sums a rank's share is read, and read and written where they are added up.
PASSES_TO_FILL, PASSES_TO_ADD = 3.5, 3
# Communications of one part are fewer, so that parts can number theirs from a multiple of it on.
NUMBERS = 1 << 20

# A single sample is not among them: its tensors need no copies to be contiguous.
RECORDED_SAMPLES = 2, 4

ONE_STACK = ("first", "layer", "last")
# Relative positions are worked out once in a stage; stages of two layers show what is left of one.
TWO_STACKS = (
    *("first", "layer", "layers", "ends_encoder"),
    *("begins_decoder", "decoder_layer", "decoder_layers", "last"),
)
LAYERS = {"layer": 1, "layers": 2, "decoder_layer": 1, "decoder_layers": 2}
# Parts that hold the word embedding; on one rank those behind the first share its.
WITH_EMBEDDING = ("first", "begins_decoder", "last")


@dataclass(frozen=True)
class Way:
    """What a part's record depends on, beside the samples of a micro-batch."""

    tensor: int
    sequence_parallel: bool
    recompute: str | None
    is_split: bool

    @classmethod
    def of(cls, layout: Layout) -> Way:
        """The way in which the parts of a layout run."""
        return cls(
            layout.tensor_model_parallel_size,
            layout.sequence_parallel,
            layout.recompute_granularity,
            layout.pipeline_schedule.startswith("zb"),
        )


Parts = Mapping[str, RankRecord]


class PartBook:
    """The parts of a model, recorded as they are asked for."""

    def __init__(self, base: Config, make_task: Callable[[Config], Task]) -> None:
        """`base` is the model's configuration; its layout does not count."""
        self._base, self._make_task = base, make_task
        self._recorded: dict[tuple[Way, int], Parts] = {}
        self._scaled: dict[tuple[Way, int], Parts] = {}

    @property
    def recordings(self) -> int:
        """How many were made."""
        return len(self._recorded)

    def parts(self, way: Way, samples: int) -> Parts:
        """The record of each part, of micro-batches of so many samples."""
        key = way, samples
        if key not in self._scaled:
            few, more = RECORDED_SAMPLES
            found = dict(self._record(way, samples if samples in (1, few, more) else few))
            if samples not in (1, few, more):
                larger = self._record(way, more)
                scaled = {n: _extended(part, larger[n], samples) for n, part in found.items()}
                is_whole = all(part is not None for part in scaled.values())
                found = {name: part for name, part in scaled.items() if part is not None}
                found = found if is_whole else dict(self._record(way, samples))
            for name in ("layer", "decoder_layer"):
                if f"{name}s" in found:
                    found[f"next_{name}"] = _following(found[name], found[f"{name}s"])
            embedding = Embedding.of(self._base, way.tensor)
            for name in WITH_EMBEDDING[1:]:
                if name in found:
                    found[f"shared_{name}"] = _without_copy(found[name], embedding)
            self._scaled[key] = found
        return self._scaled[key]

    def recorded(self, layout: Layout, gpus: int) -> Recorded:
        """What `record` would find of the layout, nearly."""
        config = layout.applied_to(self._base)
        task, topology = self._make_task(config), rank_grid(config, gpus)
        stages = task.stages(config)
        samples = layout.micro_batch_size
        parts = self.parts(Way.of(layout), samples)
        compose = _Composition(parts, layout, topology, stages).rank
        batch = config.train.global_batch(topology.data)
        return Recorded(
            config,
            task,
            topology,
            tuple(compose(rank) for rank in range(topology.pipeline)),
            batch // (samples * topology.data),
        )

    def _record(self, way: Way, samples: int) -> Parts:
        key = way, samples
        if key not in self._recorded:
            config, names = _probe(self._base, way, samples)
            found = record(config, self._make_task, way.tensor * len(names) * REPLICAS)
            self._recorded[key] = dict(zip(names, found.ranks, strict=True))
        return self._recorded[key]


def _probe(base: Config, way: Way, samples: int) -> tuple[Config, tuple[str, ...]]:
    """A configuration in which each stage is one part, and the parts' names."""
    has_decoder = base.model.model_type == "t5"
    names = TWO_STACKS if has_decoder else ONE_STACK
    layers = tuple(LAYERS.get(name, 0) for name in names)
    parallel = replace(
        base.parallel,
        tensor_model_parallel_size=way.tensor,
        pipeline_model_parallel_size=len(names),
        pipeline_model_parallel_split_rank=len(names) // 2 if has_decoder else None,
        pipeline_layers=layers,
        num_layers_per_virtual_pipeline_stage=None,
        pipeline_schedule="zb-h1" if way.is_split else "1f1b",
        pipeline_costs=None,
        sequence_parallel=way.sequence_parallel,
        use_distributed_optimizer=True,
        shard_gradients=False,
        recompute_granularity=way.recompute,
    )
    train = replace(
        base.train,
        micro_batch_size=samples,
        global_batch_size=3 * REPLICAS * samples,
        rampup_batch_size=None,
    )
    depth = sum(layers) // 2 if has_decoder else sum(layers)
    model = replace(base.model, num_layers=depth, decoder_num_layers=depth if has_decoder else None)
    return replace(base, model=model, parallel=parallel, train=train), names


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


# From records of few samples to one of any number.


def _extended(few: RankRecord, more: RankRecord, samples: int) -> RankRecord | None:
    """None where the two do not do the same."""
    recorded = RECORDED_SAMPLES
    place = (samples - recorded[0]) / (recorded[1] - recorded[0])

    def line(first: float, second: float) -> float:
        return first + place * (second - first)

    def whole(first: float, second: float) -> int:
        return max(0, round(line(first, second)))

    def event(first: Event, second: Event) -> Event:
        if isinstance(first, Operation) and isinstance(second, Operation):
            sizes = zip(first.shape, second.shape, strict=True)
            return replace(
                first,
                flops=line(first.flops, second.flops),
                bytes=whole(first.bytes, second.bytes),
                shape=tuple(whole(*each) for each in sizes),
            )
        if isinstance(first, Communication) and isinstance(second, Communication):
            return replace(first, bytes=whole(first.bytes, second.bytes))
        return first

    def segment(first: Segment, second: Segment) -> Segment:
        events = zip(first.trace, second.trace, strict=True)
        return Segment(
            tuple(event(*each) for each in events),
            round(line(first.change, second.change)),
            whole(first.peak, second.peak),
        )

    if not all(_alike(few.actions[key].trace, more.actions[key].trace) for key in few.actions):
        return None
    return replace(
        few,
        actions={key: segment(each, more.actions[key]) for key, each in few.actions.items()},
        messages={index: whole(size, more.messages[index]) for index, size in few.messages.items()},
        batch=whole(few.batch, more.batch),
    )


def _alike(first: Trace, second: Trace) -> bool:
    def kinds(trace: Trace) -> list[object]:
        return [each.name if isinstance(each, Operation) else type(each) for each in trace]

    return kinds(first) == kinds(second)


# From stages of one and of two layers to the second layer.


def _following(one: RankRecord, two: RankRecord) -> RankRecord:
    """A layer behind another one, without what a stage does once."""
    hidden = one.messages[0]
    actions = {}
    for key, segment in one.actions.items():
        place, kind, _ = key
        alone, together = one.actions[place, kind, MIDDLE], two.actions[place, kind, MIDDLE]
        once = _operations(alone) - (_operations(together) - _operations(alone))
        inner = {Kind.FORWARD: hidden, Kind.BACKWARD: -hidden}.get(kind, 0)
        actions[key] = Segment(
            tuple(_without(segment.trace, once)),
            together.change - alone.change - inner,
            min(segment.peak, together.peak),
        )
    return replace(one, actions=actions)


def _operations(segment: Segment) -> Counter[Operation]:
    return Counter(event for event in segment.trace if isinstance(event, Operation))


def _without(trace: Trace, once: Counter[Operation]) -> Iterator[Event]:
    left = once.copy()
    for event in trace:
        if isinstance(event, Operation) and left[event] > 0:
            left[event] -= 1
        else:
            yield event


# From parts to ranks.


class _Composition:
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


def _without_copy(part: RankRecord, embedding: Embedding) -> RankRecord:
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
