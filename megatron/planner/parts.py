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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron.config import Config
from megatron.pipeline.actions import Kind
from megatron.planner.composition import (
    ONE_STACK,
    REPLICAS,
    WITH_EMBEDDING,
    Composition,
    Embedding,
    Parts,
    without_copy,
)
from megatron.planner.dry_run import Recorded, record
from megatron.planner.layouts import Layout
from megatron.planner.recording import RankRecord, Segment
from megatron.planner.timing import MIDDLE
from megatron.planner.trace import Communication, Event, Operation, Trace
from megatron.training.initialize import rank_grid
from megatron.training.task import Task

# A single sample is not among them: its tensors need no copies to be contiguous.
RECORDED_SAMPLES = 2, 4

# Relative positions are worked out once in a stage; stages of two layers show what is left of one.
TWO_STACKS = (
    *("first", "layer", "layers", "ends_encoder"),
    *("begins_decoder", "decoder_layer", "decoder_layers", "last"),
)
LAYERS = {"layer": 1, "layers": 2, "decoder_layer": 1, "decoder_layers": 2}


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
                    found[f"shared_{name}"] = without_copy(found[name], embedding)
            self._scaled[key] = found
        return self._scaled[key]

    def recorded(self, layout: Layout, gpus: int) -> Recorded:
        """What `record` would find of the layout, nearly."""
        config = layout.applied_to(self._base)
        task, topology = self._make_task(config), rank_grid(config, gpus)
        stages = task.stages(config)
        samples = layout.micro_batch_size
        parts = self.parts(Way.of(layout), samples)
        compose = Composition(parts, layout, topology, stages).rank
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
