"""What the ranks of a pipeline do in a step, from really doing it.

For each kind of rank a `Trainer` is made as that rank of the cluster makes it, on the meta device,
and takes two steps of at most three micro-batches: the first to get going, the second to be
recorded. Ranks whose stages are alike do alike, and are recorded once. The first and the last
micro-batch of a step are kept apart from those between: the first finds parameters still on their
way, the last sends the gradients off. A step of hundreds of micro-batches is the middle one over
and over.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from megatron.config import Config
from megatron.mpu import Stage, Topology
from megatron.ops import kernels
from megatron.optimizer.flat_buffer import shard_spec
from megatron.optimizer.shared import Names, names
from megatron.pipeline.actions import Action, Kind
from megatron.planner.recorder import Recorder
from megatron.planner.timing import place_of
from megatron.planner.trace import Communication, Trace
from megatron.planner.world import META, group_names, one_rank
from megatron.training.task import Task
from megatron.training.trainer import Trainer

MOST_MICRO_BATCHES = 3
RECEIVED = "pipeline", "recv"

# The place of a stage among those of its rank, what is done, and with which micro-batch.
Key = tuple[int, Kind, str]


@dataclass(frozen=True)
class Segment:
    """A part of a step on one rank.

    Attributes:
        trace: its operators and communications.
        change: bytes that live at its end and not at its start. Of the pipeline's messages only
            what is received and let go at another time than at the end of the backward pass.
        peak: the most bytes that live within it, beyond those at its start.
        passes_on: whether the message that it sends lies where that lies which it has received, as
            on a stage without layers.
    """

    trace: Trace
    change: int
    peak: int
    passes_on: bool = False


@dataclass(frozen=True)
class RankRecord:
    """What a rank does in a step and holds all the time.

    Attributes:
        actions: by the place of the stage on this rank, the kind, and the place of the micro-batch.
        before: what precedes the first action.
        after: what follows the last: gradients are completed, weights updated.
        parameters: elements that the stages own, over all tensor ranks, without copies and padding.
        weights, gradients, optimizer: bytes, as they are allocated.
        rest: bytes of what else lives from step to step.
        messages: bytes of what each stage sends to the next one for a micro-batch.
        batch: bytes of a micro-batch.
        settles: whether at the end of a step all messages are known to have arrived.
    """

    actions: dict[Key, Segment]
    before: Segment
    after: Segment
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    rest: int
    messages: dict[int, int]
    batch: int
    settles: bool


def plannable(config: Config) -> Config:
    """`config` without what changes no figure of a plan, and would ask for a real device or data.

    Recorded graphs and compiled code compute what runs here one by one; packed sequences take at
    most what unpacked ones do; zb-2p, which a run fits to what it measures, is planned for equal
    times until these are known.
    """
    parallel, train = config.parallel, config.train
    if parallel.schedule == "zb-2p" and parallel.pipeline_costs is None:
        parallel = replace(parallel, pipeline_costs=(1.0, 1.0, 1.0, 0.0))
    return replace(
        config,
        parallel=parallel,
        train=replace(train, cuda_graphs=False, compile=False, profile_steps=None),
        data=replace(config.data, pack_sequences=False),
    )


def record_ranks(
    config: Config, make_task: Callable[[Config], Task], topology: Topology, device_type: str
) -> tuple[RankRecord, ...]:
    """The record of each rank along the pipeline, of tensor rank 0 and data rank 0.

    `config` knows its vocabulary and is `plannable`; `device_type` is "cuda" or "cpu".
    """
    task = make_task(config)
    ranks = topology.pipeline_groups()[0]
    kinds = [
        tuple(map(_kind, _own_stages(config, task, topology, place)))
        for place in range(topology.pipeline)
    ]
    examples = {kind: rank for rank, kind in reversed(list(zip(ranks, kinds, strict=True)))}
    told = {
        kind: _names(config, task, topology, rank, device_type) for kind, rank in examples.items()
    }
    said = [told[kind] for kind in kinds]
    records = {
        kind: _record(config, task, topology, rank, device_type, said)
        for kind, rank in examples.items()
    }
    return tuple(records[kind] for kind in kinds)


def _own_stages(config: Config, task: Task, topology: Topology, place: int) -> list[Stage]:
    """The stages of a rank along the pipeline."""
    return [s for s in task.stages(config) if s.index % topology.pipeline == place]


def _names(config: Config, task: Task, topology: Topology, rank: int, device_type: str) -> Names:
    """What a rank tells the others of its tensors.

    Ranks of a kind hold other layers, whose names differ; but no two ranks share a layer.
    """
    place = topology.coordinates(rank).pipeline
    with one_rank(topology, rank, device_type) as state:
        stages = _own_stages(config, task, topology, place)
        chunks = [task.build_model(config, state, stage) for stage in stages]
        return names(p for chunk in chunks for p in chunk.parameters())


def _kind(stage: Stage) -> object:
    """What makes a stage do what it does; where its layers stand in the model does not."""
    return (
        *(stage.num_layers, stage.num_decoder_layers, stage.has_encoder, stage.has_decoder),
        *(stage.is_first, stage.is_last, stage.ends_encoder, stage.begins_decoder),
    )


def _record(
    config: Config,
    task: Task,
    topology: Topology,
    rank: int,
    device_type: str,
    said: Sequence[Names],
) -> RankRecord:
    recorder = Recorder()
    by_kernels = device_type == "cuda" and config.train.kernels not in ("torch", "apex")
    with (
        one_rank(topology, rank, device_type, recorder, said) as state,
        kernels.using("auto" if by_kernels else "torch", META),
    ):
        recorder.names = group_names(state)
        batch = task.blank_batch(config, META)
        with recorder:
            trainer = Trainer(config, task, state)
            count = min(trainer.num_micro_batches(trainer.ramp.full), MOST_MICRO_BATCHES)
            watch = _Watch(recorder, trainer, count)
            trainer.step([batch] * count)
            segments = watch.step([batch] * count)
        on_device = (
            field
            for name, field in batch.items()
            if device_type == "cpu" or name not in task.host_fields
        )
        size = sum(field.numel() * field.element_size() for field in on_device)
        return _put_together(trainer, segments, watch, size)


class _Watch:
    """Cuts what a trainer's step does into segments.

    Attributes:
        count: micro-batches of a step.
        messages: bytes of what each stage sends on.
        at_rest: bytes that lived before the recorded step.
    """

    def __init__(self, recorder: Recorder, trainer: Trainer, count: int) -> None:
        self._recorder, self._trainer, self.count = recorder, trainer, count
        self._segments: dict[Action | str, Segment] = {}
        self._current: Action | str = "before"
        self._start = self._received = self.at_rest = 0
        self.messages = _message_sizes(trainer)

    def step(self, batches: list[dict[str, Tensor]]) -> dict[Action | str, Segment]:
        """The segments of a step, by action, and "before" and "after"."""
        # What only the garbage collector takes must not seem to live on.
        gc.collect()
        self._recorder.take()
        self._received = self._recorder.received
        self.at_rest = self._start = self._recorder.live
        self._trainer.runtime.on_action = self._on_action
        self._trainer.step(batches)
        self._close()
        return self._segments

    def _on_action(self, action: Action | None) -> None:
        self._close()
        self._current = "after" if action is None else action

    def _close(self) -> None:
        live, passes_on = self._recorder.live, self._recorder.passed_on
        trace, peak = self._recorder.take()
        change = live - self._start + self._kept(trace)
        self._segments[self._current] = Segment(trace, change, peak - self._start, passes_on)
        self._start, self._received = live, self._recorder.received

    def _kept(self, trace: Trace) -> int:
        """Bytes of received messages that live on, though a backward pass lets go of them.

        Negative where they end. Weight gradients that are left for later may need the input.
        """
        opened = sum(
            event.bytes
            for event in trace
            if isinstance(event, Communication) and (event.group, event.kind) == RECEIVED
        )
        let_go = opened - (self._recorder.received - self._received)
        action = self._current
        if self._trainer.state.pipeline.size == 1 or not isinstance(action, Action):
            return 0
        if action.kind is not Kind.BACKWARD:
            return -let_go
        last = len(self.messages) - 1
        before = self.messages[action.stage - 1] if action.stage > 0 else 0
        behind = self.messages[action.stage] if action.stage < last else 0
        return before + behind - let_go


def _put_together(
    trainer: Trainer,
    segments: dict[Action | str, Segment],
    watch: _Watch,
    batch: int,
) -> RankRecord:
    state, task = trainer.state, trainer.task
    own = _own_stages(trainer.config, task, state.topology, state.pipeline.rank)
    places = [stage.index for stage in own]
    actions = {
        (
            places.index(action.stage),
            action.kind,
            place_of(action.micro_batch, watch.count),
        ): segment
        for action, segment in segments.items()
        if isinstance(action, Action)
    }
    weights, gradients, optimizer = static_bytes(trainer)
    return RankRecord(
        actions=actions,
        before=segments["before"],
        after=segments["after"],
        parameters=_owned_parameters(trainer),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        rest=watch.at_rest - weights - gradients - optimizer,
        messages=watch.messages,
        batch=batch,
        settles=trainer.optimizer.hears_all_stages,
    )


def _message_sizes(trainer: Trainer) -> dict[int, int]:
    """Bytes of what each stage sends to the next one for a micro-batch."""
    config, task, state = trainer.config, trainer.task, trainer.state
    specs = (task.activation(config, state, stage) for stage in task.stages(config))
    return {index: prod(spec.shape) * spec.dtype.itemsize for index, spec in enumerate(specs)}


def static_bytes(trainer: Trainer) -> tuple[int, int, int]:
    """Bytes of a rank's weights, gradients and optimizer state, as they are allocated."""
    optimizer = trainer.optimizer
    buffers, shards = optimizer.gradients.buffers, optimizer.gradients.shards
    parameters = [p for chunk in trainer.chunks for p in chunk.parameters()]
    weights = _storages(parameters)
    gradients = _storages(
        [b.gradients for b in buffers if b.gradients is not None] + [s.gradients for s in shards]
    )
    state = _storages(part for _, part, *_ in optimizer.state_tensors())
    state = {key: size for key, size in state.items() if key not in weights}
    return sum(weights.values()), sum(gradients.values()), sum(state.values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


def _owned_parameters(trainer: Trainer) -> int:
    """Elements of this rank's stages, over all tensor ranks; what belongs to others left out."""
    specs = {p: shard_spec(p) for chunk in trainer.chunks for p in chunk.parameters()}
    return sum(prod(spec.shape) for spec in specs.values() if spec.tied_to is None)
