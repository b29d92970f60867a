"""How long the recorded actions of a step last on a cluster, and so the step.

An operator lasts as long as its operations at the rate that its shape reaches, or as long as its
bytes take to be read and written, whichever is more; then comes the gap to the next one. A
communication begins where the host starts it and runs beside the operators behind it. Those of one
group follow one another; those of several groups that meet on the same links share them. A wait
stops the operators until its communication has arrived. While any is under way, it keeps some
processors busy.

A step is the schedule, played by the simulator with the times of a micro-batch in the middle, and
around it what happens once: the parameters that the first forward pass waits for, the sums of
gradients that the last backward pass has left under way, and the update.

This file imports no torch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from math import ceil, inf, log2

from megatron.pipeline.actions import Kind, Schedule
from megatron.pipeline.simulator import Costs, Simulation, simulate
from megatron.planner.hardware import Hardware, Link
from megatron.planner.trace import Communication, Operation, Trace, Wait

MICROSECOND = 1e-6
FIRST, MIDDLE, LAST = "first", "middle", "last"
SPLITS_OF_K = (1, 2, 4, 8)  # as cuBLAS tries them where a result has few tiles
ALL_STAGES = ("model", "world")  # groups in which stages meet
MESSAGES = ("send", "recv")
TREES = ("all-reduce", "broadcast")  # what NCCL does by trees where it is small


@lru_cache(maxsize=1 << 16)
def operation_seconds(operation: Operation, hardware: Hardware) -> float:
    """How long the device is busy with an operator, the gap behind it included.

    Raises:
        ConfigError: the hardware has no rate for the operator's number format.
    """
    moved = operation.bytes / (hardware.bandwidth_gb * 1e9 * hardware.bandwidth_reached)
    computed = 0.0
    if operation.kind == "matmul" and operation.shape:
        computed = _product_seconds(operation.shape, operation.dtype, hardware)
    elif operation.kind == "attention":
        computed = _attention_seconds(operation, hardware)
    return max(moved, computed) + hardware.launch_us * MICROSECOND


def communication_seconds(communication: Communication, hardware: Hardware) -> float:
    """How long a collective or message lasts that has its links to itself.

    Inside a node a ring of n ranks moves 2 (n - 1) / n of an all-reduce over each link, and half of
    that of an all-gather or a reduce-scatter. A group over several nodes sends as much out of each
    of them, through the adapters of all its members there.
    """
    ranks, hub = communication.ranks, hardware.gpus_per_node
    if len(ranks) < 2:
        return 0.0
    on_node = Counter(rank // hub for rank in ranks).values()
    moved = communication.bytes * _moved_share(communication.kind, len(ranks))
    inside = _link_seconds(communication.kind, moved, max(on_node), hardware.nvlink)
    if len(on_node) == 1:
        return inside
    network = hardware.network
    between = _link_seconds(communication.kind, moved / min(on_node), len(on_node), network)
    return max(inside, between) if max(on_node) > 1 else between


def _moved_share(kind: str, ranks: int) -> float:
    """How often a tensor passes over each link of a ring."""
    match kind:
        case "all-reduce":
            return 2 * (ranks - 1) / ranks
        case "all-gather" | "reduce-scatter":
            return (ranks - 1) / ranks
    return 1.0


def _link_seconds(kind: str, moved: float, members: int, link: Link) -> float:
    """`moved` bytes over each of the links between `members` places."""
    name = "message" if kind in MESSAGES else kind.replace("-", "_")
    steps = 2 * log2(members) if kind in TREES else members - 1
    latency = (link.start_us + steps * link.latency_us) * MICROSECOND
    return latency + moved / (link.bandwidth_gb * 1e9 * getattr(link.reached, name))


def _product_seconds(shape: tuple[int, ...], dtype: str, hardware: Hardware) -> float:
    """The best of the ways in which a product can be cut into tiles."""
    batch, m, n, k = shape
    matmul = hardware.matmul
    rate = hardware.peak_flops(dtype) * matmul.reached / hardware.processors
    seconds = inf
    for rows, columns, speed in matmul.tiles:
        tiles = batch * min(ceil(m / rows) * ceil(n / columns), ceil(m / columns) * ceil(n / rows))
        for splits in SPLITS_OF_K:
            waves = ceil(tiles * splits / hardware.processors)
            tile = 2 * rows * columns * (k / splits + matmul.start_k) / (rate * speed)
            seconds = min(seconds, waves * tile)
    return seconds


def _attention_seconds(operation: Operation, hardware: Hardware) -> float:
    attention, keys = hardware.attention, operation.shape[2]
    share = attention.backward if "backward" in operation.name else attention.forward
    reached = share * keys / (keys + attention.half_length)
    flops = operation.flops / 2 if operation.causal else operation.flops
    return flops / (hardware.peak_flops(operation.dtype) * reached)


@dataclass(slots=True)
class _UnderWay:
    """A communication that has been started.

    Attributes:
        left: seconds that it still needs with its links to itself.
    """

    number: int
    is_inside: bool
    left: float


@dataclass
class Clock:
    """The device of one rank: what it has done by now, and the communications under way.

    These go on from one trace to the next. Messages of the pipeline pass at no cost: the
    schedule's simulator counts them.

    Attributes:
        now: seconds.
        waited: seconds of them that operators stood still for communications.
    """

    hardware: Hardware
    now: float = 0.0
    waited: float = 0.0
    _queues: dict[tuple[int, ...], deque[_UnderWay]] = field(default_factory=dict)
    _unfinished: set[int] = field(default_factory=set)

    def run(self, trace: Trace) -> None:
        """Do what the trace says; at least as long as the host needs to issue it."""
        begun, issued = self.now, 0
        for event in trace:
            if isinstance(event, Operation):
                issued += 1
                self._compute(operation_seconds(event, self.hardware))
            elif isinstance(event, Wait):
                self._wait_for(event.number)
            elif event.kind not in MESSAGES:
                self._start(event)
        self.wait_until(begun + issued * self.hardware.issue_us * MICROSECOND)

    def wait_until(self, moment: float) -> None:
        """Stand still until then; communications go on."""
        while self.now < moment and self._queues:
            self._pass(min(moment - self.now, self._next_arrival()))
        self.now = max(self.now, moment)

    def _start(self, communication: Communication) -> None:
        ranks = communication.ranks
        per_node = self.hardware.gpus_per_node
        started = _UnderWay(
            communication.number,
            ranks[0] // per_node == ranks[-1] // per_node,
            communication_seconds(communication, self.hardware),
        )
        self._queues.setdefault(ranks, deque()).append(started)
        self._unfinished.add(communication.number)

    def _wait_for(self, number: int) -> None:
        begun = self.now
        while number in self._unfinished:
            self._pass(self._next_arrival())
        self.waited += self.now - begun

    def _compute(self, seconds: float) -> None:
        """Operators of so many seconds of a device with nothing else to do."""
        hardware = self.hardware
        slower = 1 - hardware.communication_processors / hardware.processors
        while self._queues and seconds > 0:
            step = min(seconds / slower, self._next_arrival())
            self._pass(step)
            seconds -= step * slower
        self.now += max(seconds, 0.0)

    def _next_arrival(self) -> float:
        """Seconds until one of the communications under way has arrived."""
        sharing = self._sharing()
        return min(q[0].left * sharing[q[0].is_inside] for q in self._queues.values())

    def _sharing(self) -> Counter[bool]:
        """How many communications share the links inside the node, and those out of it."""
        return Counter(queue[0].is_inside for queue in self._queues.values())

    def _pass(self, seconds: float) -> None:
        sharing = self._sharing()
        self.now += seconds
        for ranks, queue in list(self._queues.items()):
            first = queue[0]
            first.left -= seconds / sharing[first.is_inside]
            if first.left <= 1e-12:
                self._unfinished.discard(first.number)
                queue.popleft()
                if not queue:
                    del self._queues[ranks]


def place_of(micro_batch: int, micro_batches: int) -> str:
    """Whether a micro-batch is the last of a step, else the first, or one between."""
    if micro_batch == micro_batches - 1:
        return LAST
    return FIRST if micro_batch == 0 else MIDDLE


@dataclass(frozen=True)
class RankTraces:
    """What one pipeline rank does in a step.

    Attributes:
        actions: by stage, kind, and the micro-batch's place in the step (`place_of`); of a step of
            three micro-batches or fewer.
        before: from the start of the step to its first action.
        after: from the last action to the end of the step.
    """

    actions: Mapping[tuple[int, Kind, str], Trace]
    before: Trace = ()
    after: Trace = ()

    def of(self, stage: int, kind: Kind, *places: str) -> Trace:
        """The trace of an action at the first of these places that there is; else nothing."""
        found = (self.actions.get((stage, kind, place)) for place in places)
        return next((trace for trace in found if trace is not None), ())


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and where they go.

    Attributes:
        seconds: of the whole step, one following another.
        simulation: of the schedule alone, with the times of a micro-batch in the middle.
        before: what comes before the pipeline can start, parameters to be waited for included.
        after: from the last action to the end: gradients on their way, norm and update.
        costs: of a micro-batch in the middle, by stage, which the simulation has taken.
    """

    seconds: float
    simulation: Simulation
    before: float
    after: float
    costs: Costs


def step_time(schedule: Schedule, ranks: Sequence[RankTraces], hardware: Hardware) -> StepTime:
    """The time of a step, one of many: its parameters arrive from the update before it.

    Args:
        schedule: of the pipeline.
        ranks: one for each of its ranks.

    A rank that is late stays late: no idle time of the schedule makes up for it.

    Raises:
        ConfigError: the hardware has no rate for a number format.
    """
    costs = _costs(schedule, ranks, hardware)
    simulation = simulate(schedule, costs)
    late = _delay_of_the_start(schedule, simulation, ranks, hardware)
    clocks, begun = [], []
    for rank, traces in enumerate(ranks):
        clock = _clock_after_update(traces, hardware)
        clock.run(traces.before)
        _walk(schedule, simulation, rank, traces, clock, late)
        clocks.append(clock)
        begun.append(simulation.spans[schedule.ranks[rank][0]].start)
    parted = [_until_stages_meet(traces.after) for traces in ranks]
    for clock, (alone, _) in zip(clocks, parted, strict=True):
        clock.run(alone)
    if any(together for _, together in parted):
        begun = [0.0] * len(clocks)
        meeting = max(clock.now for clock in clocks)
        for clock, (_, together) in zip(clocks, parted, strict=True):
            clock.wait_until(meeting)
            clock.run(together)
    seconds = max(clock.now - start for clock, start in zip(clocks, begun, strict=True))
    return StepTime(seconds, simulation, late, seconds - late - simulation.cost, costs)


def _costs(schedule: Schedule, ranks: Sequence[RankTraces], hardware: Hardware) -> Costs:
    """Of a micro-batch in the middle, or one like it."""
    by_kind: dict[Kind, list[float]] = {kind: [] for kind in Kind}
    messages = []
    for stage, rank in enumerate(schedule.placement):
        # A first forward pass waits for parameters, a last backward pass sends gradients off.
        passes = {
            kind: ranks[rank].of(stage, kind, MIDDLE, *others)
            for kind, others in (
                (Kind.FORWARD, (LAST, FIRST)),
                (Kind.BACKWARD, (FIRST, LAST)),
                (Kind.WEIGHT, (FIRST, LAST)),
            )
        }
        for kind, trace in passes.items():
            by_kind[kind].append(_seconds(trace, hardware))
        sent = [
            event
            for event in chain.from_iterable(passes.values())
            if isinstance(event, Communication) and event.kind == "send"
        ]
        messages.append(max((communication_seconds(e, hardware) for e in sent), default=0.0))
    return Costs(by_kind[Kind.FORWARD], by_kind[Kind.BACKWARD], by_kind[Kind.WEIGHT], messages)


def _seconds(trace: Trace, hardware: Hardware) -> float:
    """Of a trace by itself."""
    clock = Clock(hardware)
    clock.run(trace)
    return clock.now


def _clock_after_update(traces: RankTraces, hardware: Hardware) -> Clock:
    """At the start of a step, with the parameters under way that the last one has updated."""
    clock = Clock(hardware)
    clock.run(_as_in_the_step_before(traces))
    clock.now = 0.0
    return clock


def _as_in_the_step_before(traces: RankTraces) -> Trace:
    """`after`, where what it leaves under way has the numbers that this step waits for."""
    everything = [*traces.before, *chain.from_iterable(traces.actions.values()), *traces.after]
    started = {event.number for event in everything if isinstance(event, Communication)}
    awaited = {event.number for event in everything if isinstance(event, Wait)}
    left = {event.number for event in traces.after if isinstance(event, Communication)} - awaited
    # What is sent at the end of a step is awaited in the next; what else is, was sent earlier.
    carried = zip(sorted(left, reverse=True), sorted(awaited - started, reverse=True), strict=False)
    numbers = dict(carried)
    return tuple(
        replace(event, number=numbers.get(event.number, event.number))
        if isinstance(event, Communication)
        else event
        for event in traces.after
    )


def _delay_of_the_start(
    schedule: Schedule, simulation: Simulation, ranks: Sequence[RankTraces], hardware: Hardware
) -> float:
    """By how much the first forward pass ends later than in the simulation."""
    rank = schedule.placement[0]
    first = schedule.ranks[rank][0]
    clock = _clock_after_update(ranks[rank], hardware)
    clock.run(ranks[rank].before)
    place = place_of(first.micro_batch, schedule.num_micro_batches)
    clock.run(ranks[rank].of(first.stage, first.kind, place))
    return max(0.0, clock.now - simulation.spans[first].end)


def _walk(
    schedule: Schedule,
    simulation: Simulation,
    rank: int,
    traces: RankTraces,
    clock: Clock,
    late: float,
) -> None:
    """Take a rank through its actions, which begin `late`, but for the very first of all."""
    for action in schedule.ranks[rank]:
        span = simulation.spans[action]
        clock.wait_until(span.start + (late if span.start > 0 else 0.0))
        place = place_of(action.micro_batch, schedule.num_micro_batches)
        if place == MIDDLE:
            clock.wait_until(clock.now + span.end - span.start)
        else:
            clock.run(traces.of(action.stage, action.kind, place))
        late = max(late, clock.now - span.end)


def _until_stages_meet(trace: Trace) -> tuple[Trace, Trace]:
    """What a rank does by itself, and what only together with all stages."""
    for place, event in enumerate(trace):
        if isinstance(event, Communication) and event.group in ALL_STAGES:
            return trace[:place], trace[place:]
    return trace, ()
