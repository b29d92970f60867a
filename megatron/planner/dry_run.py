"""A run on a cluster of any size, without the cluster: what it would hold, send, compute and take.

1. Record what each kind of rank does in a step (`recording`): the real model, optimizer and runtime
   on the meta device, as one rank of the whole cluster.
2. Lay the recorded actions out over the real schedule: the peak of memory (`memory`), all that is
   communicated, all operations.
3. Time it on the hardware (`timing`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.mpu import Topology
from megatron.pipeline.actions import Schedule
from megatron.pipeline.messages import Step, compile_ranks
from megatron.pipeline.schedule import make_schedule
from megatron.pipeline.simulator import Costs
from megatron.planner.hardware import Hardware
from megatron.planner.memory import message_bytes, peak_activations
from megatron.planner.plan import CommunicationTotal, Plan, RankPlan
from megatron.planner.recording import RECEIVED, RankRecord, Segment, plannable, record_ranks
from megatron.planner.timing import RankTraces, place_of, step_time
from megatron.planner.trace import Communication, Operation
from megatron.training.batch_ramp import BatchRamp
from megatron.training.initialize import rank_grid
from megatron.training.task import Task


@dataclass(frozen=True)
class Recorded:
    """What was recorded of a configuration on a cluster, before any time is known."""

    config: Config
    task: Task
    topology: Topology
    ranks: tuple[RankRecord, ...]
    micro_batches: int

    @property
    def stages(self) -> int:
        """Stages of the whole model, virtual ones included."""
        return len(self.task.stages(self.config))

    @property
    def fits_schedule_to_times(self) -> bool:
        """Whether the run plans its schedule anew by what it has measured (`training.plan`)."""
        parallel = self.config.parallel
        unknown = parallel.schedule == "zb-2p" and parallel.pipeline_costs is None
        return unknown and self.topology.pipeline > 1

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank of the pipeline."""
        return list(range(rank, self.stages, self.topology.pipeline))

    def schedule(self, costs: Costs | None = None) -> Schedule:
        """The schedule of a whole step as the run makes it, by stated costs or else by these."""
        parallel = self.config.parallel
        stated = parallel.pipeline_costs
        return make_schedule(
            parallel.schedule,
            self.topology.pipeline,
            self.micro_batches,
            virtual=self.stages // self.topology.pipeline,
            costs=costs if stated is None else Costs(*stated),
        )

    def traces(self) -> list[RankTraces]:
        """What each rank of the pipeline does, for the clock."""
        return [
            RankTraces(
                {
                    (stages[place], kind, at): segment.trace
                    for (place, kind, at), segment in record.actions.items()
                },
                record.before.trace,
                record.after.trace,
            )
            for rank, record in enumerate(self.ranks)
            for stages in [self.stages_of(rank)]
        ]


def dry_run(
    config: Config, make_task: Callable[[Config], Task], world_size: int, hardware: Hardware
) -> Plan:
    """What `config` costs on `world_size` ranks of `hardware`, or on CPUs with --use-cpu.

    `config` knows its vocabulary, and is valid for so many ranks.

    Raises:
        ConfigError: the hardware has no rate for the number format.
    """
    return put_together(record(config, make_task, world_size), hardware)


def record(config: Config, make_task: Callable[[Config], Task], world_size: int) -> Recorded:
    """Takes the steps of each kind of rank.

    Raises:
        ConfigError: ranks with GPUs are to communicate by gloo, which copies through the host.
    """
    parallel = config.parallel
    if parallel.distributed_backend == "gloo" and not parallel.use_cpu:
        raise ConfigError("--dry-run plans for NCCL between GPUs; gloo is for --use-cpu")
    device_type = "cpu" if parallel.use_cpu else "cuda"
    topology = rank_grid(config, world_size)
    planned = plannable(config)
    ramp = BatchRamp.of(config.train, topology.data)
    micro_batches = ramp.full // (config.train.micro_batch_size * topology.data)
    return Recorded(
        config,
        make_task(planned),
        topology,
        record_ranks(planned, make_task, topology, device_type),
        micro_batches,
    )


def put_together(recorded: Recorded, hardware: Hardware) -> Plan:
    """The plan of what was recorded, on `hardware`."""
    traces = recorded.traces()
    schedule = recorded.schedule()
    timed = step_time(schedule, traces, hardware)
    if recorded.fits_schedule_to_times:
        schedule = recorded.schedule(_slowest(timed.costs))
        timed = step_time(schedule, traces, hardware)
    config, topology = recorded.config, recorded.topology
    samples = recorded.micro_batches * config.train.micro_batch_size * topology.data
    return Plan(
        config=config,
        topology=topology,
        parameters=sum(record.parameters for record in recorded.ranks),
        schedule=schedule,
        micro_batches=recorded.micro_batches,
        ranks=tuple(_rank_plans(recorded, schedule)),
        flops=_flops(recorded, schedule),
        model_flops=recorded.task.flops_per_sample(config) * samples,
        simulation=timed.simulation,
        step_time=timed.seconds,
        hardware=hardware,
    )


def _slowest(costs: Costs) -> Costs:
    """What a run measures to plan zb-2p by: the slowest rank's times, messages taken as free."""
    of_all = costs.forward, costs.backward, costs.weight
    return Costs(*(max(each) if isinstance(each, Sequence) else each for each in of_all))


def _rank_plans(recorded: Recorded, schedule: Schedule) -> Iterator[RankPlan]:
    # On an accelerator the next step's micro-batches arrive while this one is computed.
    ahead = 1 if recorded.config.parallel.use_cpu else 2
    count = recorded.micro_batches
    compiled = compile_ranks(schedule, range(schedule.num_ranks))
    for rank, (record, steps) in enumerate(zip(recorded.ranks, compiled, strict=True)):
        stages = recorded.stages_of(rank)
        yield RankPlan(
            rank=rank,
            stages=tuple(stages),
            parameters=record.parameters,
            weights=record.weights,
            gradients=record.gradients,
            optimizer=record.optimizer,
            activations=peak_activations(record, steps, stages, count, ahead),
            communications=_communications(recorded, schedule, rank, steps),
        )


def _segments(recorded: Recorded, schedule: Schedule, rank: int) -> list[tuple[Segment, int]]:
    """The recorded parts of a rank's step, and how often each of them happens."""
    record, stages = recorded.ranks[rank], recorded.stages_of(rank)
    counts = Counter(
        (
            stages.index(action.stage),
            action.kind,
            place_of(action.micro_batch, recorded.micro_batches),
        )
        for action in schedule.ranks[rank]
    )
    actions = [(record.actions[key], count) for key, count in counts.items()]
    return [(record.before, 1), *actions, (record.after, 1)]


def _communications(
    recorded: Recorded, schedule: Schedule, rank: int, steps: Sequence[Step]
) -> tuple[CommunicationTotal, ...]:
    calls: Counter[tuple[str, str, int]] = Counter()
    sizes: Counter[tuple[str, str, int]] = Counter()

    def add(key: tuple[str, str, int], count: int, size: int) -> None:
        calls[key] += count
        sizes[key] += count * size

    for segment, count in _segments(recorded, schedule, rank):
        for event in segment.trace:
            if isinstance(event, Communication) and not _is_opened_ahead(event):
                add((event.group, event.kind, len(event.ranks)), count, event.bytes)
    for message in chain.from_iterable(step.post for step in steps):
        add((*RECEIVED, 2), 1, message_bytes(recorded.ranks[rank], message))
    return tuple(CommunicationTotal(*key, calls[key], sizes[key]) for key in sorted(calls))


def _is_opened_ahead(event: Communication) -> bool:
    """Whether it is a receive, of which the schedule decides during which action it is opened."""
    return (event.group, event.kind) == RECEIVED


def _flops(recorded: Recorded, schedule: Schedule) -> float:
    """Of all ranks; tensor and data ranks do alike."""
    copies = recorded.topology.tensor * recorded.topology.data
    return copies * sum(
        count * event.flops
        for rank in range(schedule.num_ranks)
        for segment, count in _segments(recorded, schedule, rank)
        for event in segment.trace
        if isinstance(event, Operation)
    )
