"""What a layout takes at least, in a fraction of a millisecond: a step's time and a GPU's memory.

The times of a stage's parts are added up, and the schedule is a formula in place of a table:

    1f1b         a rank's time for each micro-batch, and once the times of all others; messages
                 lengthen the way of a micro-batch there and back, which p - r of them share
    interleaved  the others' times by the number of chunks
    zb-h1        the others' forward and input passes, less the time of their weights' gradients
    zb-2p        no more than the messages

Both figures lean to the low side, so that a search in their order misses little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron.config import Config
from megatron.mpu import Topology
from megatron.pipeline.actions import Kind
from megatron.planner.composition import REPLICAS, part_names
from megatron.planner.hardware import Hardware
from megatron.planner.layouts import Layout
from megatron.planner.parts import PartBook, Way
from megatron.planner.recording import RankRecord
from megatron.planner.timing import (
    MICROSECOND,
    MIDDLE,
    Clock,
    communication_seconds,
    operation_seconds,
)
from megatron.planner.trace import Communication, Operation
from megatron.training.task import Task

# Of a forward pass: all but the embedding, the heads and the end of the last layer.
RECOMPUTED = 0.85
KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT)


@dataclass(frozen=True)
class Estimate:
    """Attributes: seconds of a step; bytes of the fullest GPU; static of them, always held."""

    seconds: float
    bytes: int
    static: int


@dataclass(frozen=True)
class _Figures:
    """A part's, or their sums.

    Attributes:
        device, issue: seconds of the GPU and of the host, by kind of pass.
        held: bytes that a forward pass leaves.
        rise, peak: the most bytes of a forward pass beyond these, and of a backward pass.
        update: seconds of the weights' update, as it was recorded.
    """

    device: tuple[float, ...]
    issue: tuple[float, ...]
    held: int
    rise: int
    peak: int
    weights: int
    gradients: int
    optimizer: int
    update: float

    def times(self, count: int) -> _Figures:
        return replace(
            self,
            device=tuple(count * each for each in self.device),
            issue=tuple(count * each for each in self.issue),
            held=count * self.held,
            weights=count * self.weights,
            gradients=count * self.gradients,
            optimizer=count * self.optimizer,
            update=count * self.update,
        )

    def plus(self, other: _Figures) -> _Figures:
        return _Figures(
            tuple(a + b for a, b in zip(self.device, other.device, strict=True)),
            tuple(a + b for a, b in zip(self.issue, other.issue, strict=True)),
            self.held + other.held,
            max(self.rise, other.rise),
            max(self.peak, other.peak),
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.update + other.update,
        )

    def twice_forward(self) -> _Figures:
        """With the forward pass, nearly, once more in the backward pass."""
        forward, backward, weight = self.device
        return replace(self, device=(forward, backward + RECOMPUTED * forward, weight))

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each kind of pass."""
        return tuple(map(max, self.device, self.issue))


NOTHING = _Figures((0.0,) * 3, (0.0,) * 3, 0, 0, 0, 0, 0, 0, 0.0)


class Estimator:
    """Estimates layouts of one model on one cluster."""

    def __init__(
        self,
        base: Config,
        make_task: Callable[[Config], Task],
        book: PartBook,
        gpus: int,
        hardware: Hardware,
    ) -> None:
        self._base, self._make_task, self._book = base, make_task, book
        self._gpus, self._hardware = gpus, hardware
        self._patient = replace(hardware, issue_us=0.0)
        self._names: dict[object, list[list[Counter[str]]]] = {}
        self._part_figures: dict[object, _Figures] = {}
        self._stage_figures: dict[object, _Figures] = {}

    def estimate(self, layout: Layout, way: Way | None = None) -> Estimate:
        """Of a layout, whose parts run in their own way, or in `way`."""
        way = way or Way.of(layout)
        samples = layout.micro_batch_size
        topology = Topology(
            self._gpus, layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        )
        parts = self._book.parts(way, samples)
        batch = self._base.train.global_batch(topology.data)
        count = batch // (samples * topology.data)
        hidden = max(parts["first"].messages.values())
        ranks = [
            [self._stage(way, samples, names, parts, hidden) for names in own]
            for own in self._parts_of(layout)
        ]
        if layout.recompute_granularity == "full" and way.recompute is None:
            ranks = [[stage.twice_forward() for stage in stages] for stages in ranks]
        whole = [_sum(stages) for stages in ranks]
        static = [self._static(rank, layout, topology) for rank in whole]
        fullest = max(
            held + self._active(layout, place, stages, count, hidden)
            for place, (held, stages) in enumerate(zip(static, ranks, strict=True))
        )
        micro_batches = 2 * count * max(part.batch for part in parts.values())
        seconds = self._pipeline(layout, topology, whole, count, hidden)
        seconds += max(
            self._outside(layout, topology, rank, count) for rank in whole[:1] + whole[-1:]
        )
        return Estimate(seconds, fullest + micro_batches, max(static))

    def _parts_of(self, layout: Layout) -> list[list[Counter[str]]]:
        """How often each stage of each rank has each part."""
        key = (
            layout.pipeline_model_parallel_size,
            layout.pipeline_model_parallel_split_rank,
            layout.num_layers_per_virtual_pipeline_stage,
            layout.pipeline_schedule == "interleaved",
        )
        if key not in self._names:
            config = layout.applied_to(self._base)
            stages = self._make_task(config).stages(config)
            pipeline = layout.pipeline_model_parallel_size
            self._names[key] = [
                [Counter(names) for names in part_names(stages[rank::pipeline])]
                for rank in range(pipeline)
            ]
        return self._names[key]

    def _stage(
        self,
        way: Way,
        samples: int,
        names: Counter[str],
        parts: Mapping[str, RankRecord],
        hidden: int,
    ) -> _Figures:
        key = way, samples, tuple(names.items())
        if key not in self._stage_figures:
            total, behind = NOTHING, 0
            for name, count in reversed(names.items()):
                part = self._part(way, samples, name, parts[name])
                # A backward pass begins at the end, and lets go of what it has passed.
                part = replace(part, peak=part.peak - behind, rise=part.rise - behind)
                behind += count * (part.held + hidden)
                total = total.plus(part.times(count))
            self._stage_figures[key] = replace(total, held=behind - hidden)
        return self._stage_figures[key]

    def _part(self, way: Way, samples: int, name: str, part: RankRecord) -> _Figures:
        key = way, samples, name
        if key not in self._part_figures:
            segments = [part.actions.get((0, kind, MIDDLE)) for kind in KINDS]
            device, issue = [], []
            for segment in segments:
                clock = Clock(self._patient)
                clock.run(segment.trace if segment else ())
                operations = (
                    [e for e in segment.trace if isinstance(e, Operation)] if segment else []
                )
                device.append(clock.now)
                issue.append(len(operations) * self._hardware.issue_us * MICROSECOND)
            forward, backward = part.actions[0, KINDS[0], MIDDLE], part.actions[0, KINDS[1], MIDDLE]
            self._part_figures[key] = _Figures(
                tuple(device),
                tuple(issue),
                forward.change,
                forward.peak - forward.change,
                backward.peak,
                part.weights,
                part.gradients,
                part.optimizer,
                sum(
                    operation_seconds(e, self._hardware)
                    for e in part.after.trace
                    if isinstance(e, Operation)
                ),
            )
        return self._part_figures[key]

    def _static(self, rank: _Figures, layout: Layout, topology: Topology) -> int:
        spread = topology.data if layout.use_distributed_optimizer else 1
        streamed = topology.data if layout.shard_gradients else 1
        # A recording spreads the optimizer over its replicas.
        return round(rank.weights + rank.gradients / streamed + REPLICAS * rank.optimizer / spread)

    def _active(
        self, layout: Layout, place: int, stages: Sequence[_Figures], count: int, hidden: int
    ) -> int:
        """Bytes of the passes that a rank holds at once."""
        pipeline, chunks = layout.pipeline_model_parallel_size, len(stages)
        ahead = pipeline - place
        if layout.pipeline_schedule == "interleaved":
            ahead = 2 * (pipeline - place - 1) + (chunks - 1) * pipeline + 1
        elif layout.pipeline_schedule == "gpipe":
            ahead = count
        message = hidden if pipeline > 1 else 0
        least = min(stage.held for stage in stages) + message
        now = max(stage.held + max(stage.peak, stage.rise) for stage in stages) + message
        return (min(ahead, count * chunks) - 1) * least + now

    def _pipeline(
        self,
        layout: Layout,
        topology: Topology,
        ranks: Sequence[_Figures],
        count: int,
        hidden: int,
    ) -> float:
        seconds = [rank.seconds for rank in ranks]
        each = [sum(rank) for rank in seconds]
        slowest, size = max(each), len(ranks)
        if size == 1:
            return count * slowest
        ends = topology.pipeline_groups()[0][:2]
        message = communication_seconds(
            Communication("send", "pipeline", ends, hidden, 0), self._hardware
        )
        way = 2 * (size - 1) * message
        match layout.pipeline_schedule:
            case "interleaved":
                chunks = len(self._parts_of(layout)[0])
                alone = sum(each) + chunks * way + (count - 1) * slowest / chunks
                filled = count * slowest + (sum(each) - slowest) / chunks + way
                return max(alone, filled)
            case "zb-h1" | "zb-2p" as name:
                if not any(weight for _, _, weight in seconds):  # recorded without the split
                    return count * slowest + way
                inputs = [forward + backward for forward, backward, _ in seconds]
                alone = sum(inputs) + way + (count - 1) * max(inputs) + seconds[0][2]
                waiting = (
                    0.0 if name == "zb-2p" else sum(max(0.0, f + b - w) for f, b, w in seconds[1:])
                )
                return max(alone, count * slowest + waiting + way)
        through = (
            way
            + max(
                count * each[r]
                + sum(each[:r])
                # While the stages behind it are at work, a rank goes on with other forward passes.
                + max(0.0, sum(each[r + 1 :]) - (min(count, size - r) - 1) * seconds[r][0])
                for r in range(size)
            )
        )
        if layout.pipeline_schedule == "gpipe" or count <= size:
            return through
        ways = (
            (sum(each[r:]) + 2 * (size - 1 - r) * message) / (size - r) - slowest
            for r in range(size)
        )
        return through + (count - 1) * max(0.0, *ways)

    def _outside(self, layout: Layout, topology: Topology, rank: _Figures, count: int) -> float:
        """What is not hidden of the gradients' sums, the update and the parameters sent on."""
        spread = topology.data if layout.use_distributed_optimizer else 1
        update = REPLICAS * rank.update / spread
        moved = self._hardware.bandwidth_gb * 1e9 * self._hardware.bandwidth_reached
        update += rank.gradients / moved / (topology.data if layout.shard_gradients else 1)
        if topology.data == 1:
            return update
        group = tuple(range(0, topology.data * topology.tensor, topology.tensor))
        sums_kind = "reduce-scatter" if spread > 1 else "all-reduce"
        chunks = len(self._parts_of(layout)[0])
        forward, backward, weight = (each / chunks for each in rank.seconds)
        sums = communication_seconds(
            Communication(sums_kind, "data", group, rank.gradients, 0), self._hardware
        )
        pieces = max(1.0, rank.gradients / 4 / self._base.parallel.gradient_bucket_size)
        more = chunks - 1
        hidden = (1 + more * layout.pipeline_model_parallel_size) * (backward + weight)
        if layout.shard_gradients:
            filling = 4 * rank.gradients / moved
            return update + count * (filling + max(0.0, sums - hidden))
        left = max(sums / pieces, sums - hidden)
        if spread > 1:
            sent = communication_seconds(
                Communication("all-gather", "data", group, rank.weights, 0), self._hardware
            )
            hidden = (1 + more * layout.pipeline_model_parallel_size) * forward
            left += max(sent / pieces, sent - hidden)
        return update + left


def _sum(stages: Sequence[_Figures]) -> _Figures:
    total = NOTHING
    for stage in stages:
        total = total.plus(stage)
    return total
