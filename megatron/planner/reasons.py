"""Why a layout is as fast as it is, in words.

A step's time is taken apart into what the GPUs of a pipeline do with it on average; the parts add
up to the step. A layout is then held against the fastest one: by what they differ in, where the
difference in time arises, and what would not have fitted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace

from megatron.mpu import Topology
from megatron.pipeline.actions import Kind
from megatron.planner.hardware import GIB, Hardware
from megatron.planner.layouts import AXES, Layout
from megatron.planner.report import peak_bytes
from megatron.planner.search import Found, Search
from megatron.planner.timing import FIRST, LAST, MIDDLE, Clock, operation_seconds
from megatron.planner.trace import Operation

# Of a step's time; what is less is left unsaid.
WORTH_SAYING = 0.002


@dataclass(frozen=True)
class Spent:
    """Seconds of a step, of a GPU on average: their sum is the step.

    Attributes:
        products: matrix products and attention.
        others: all other operators.
        tensor: waiting for tensor ranks, and what communication under way slows down.
        bubble: waiting for other stages.
        rest: gradients still to be summed, the update, parameters still to be gathered.
    """

    products: float
    others: float
    tensor: float
    bubble: float
    rest: float


NAMES = {
    "products": "matrix products and attention",
    "others": "other operators",
    "tensor": "communication between tensor ranks",
    "bubble": "bubble",
    "rest": "gradient sums and update",
}


def spent(found: Found) -> Spent:
    """Where the time of a step goes."""
    plan, recorded = found.plan, found.recorded
    products = others = tensor = 0.0
    known: dict[tuple[int, int, Kind], tuple[float, float, float]] = {}
    for rank, record in enumerate(recorded.ranks):
        stages = recorded.stages_of(rank)
        counts = Counter((stages.index(a.stage), a.kind) for a in plan.schedule.ranks[rank])
        for (place, kind), count in counts.items():
            key = id(record), place, kind
            if key not in known:
                places = (at for at in (MIDDLE, FIRST, LAST) if (place, kind, at) in record.actions)
                trace = record.actions[place, kind, next(places)].trace
                known[key] = _parts_of(trace, plan.hardware)
            products += count * known[key][0]
            others += count * known[key][1]
            tensor += count * known[key][2]
    ranks, cost = len(recorded.ranks), plan.simulation.cost
    bubble = plan.bubble * cost
    busy = cost - bubble
    # First and last micro-batches differ a little from those between, by which all are counted.
    share = busy / (products + others + tensor) * ranks if products else 0.0
    each = share / ranks
    rest = plan.step_time - cost
    return Spent(each * products, each * others, each * tensor, bubble, rest)


def _parts_of(trace: tuple[object, ...], hardware: Hardware) -> tuple[float, float, float]:
    seconds = {True: 0.0, False: 0.0}
    for event in trace:
        if isinstance(event, Operation):
            seconds[event.kind != "memory"] += operation_seconds(event, hardware)
    clock = Clock(hardware)
    clock.run(trace)  # type: ignore[arg-type]
    return seconds[True], seconds[False], max(0.0, clock.now - sum(seconds.values()))


def reason(found: Found, search: Search) -> str:
    """One or two sentences on a layout that a search has found."""
    first = search.best[0]
    remarks = _remarks(found, search)
    if found is first:
        own = _shares(spent(found), found.plan.step_time)
        return "; ".join([f"fastest: {own}", *remarks])
    slower = found.plan.step_time / first.plan.step_time - 1
    lines = [f"{100 * slower:.1f} % slower with {_differences(found.layout, first.layout)}"]
    if changes := _changes(spent(found), spent(first), first.plan.step_time):
        lines[0] += f": {changes}"
    return "; ".join([*lines, *remarks])


def _shares(parts: Spent, whole: float) -> str:
    shares = {name: getattr(parts, name) / whole for name in NAMES}
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    return ", ".join(
        f"{100 * share:.1f} % {NAMES[name]}" for name, share in ordered if share >= WORTH_SAYING
    )


def _changes(own: Spent, others: Spent, whole: float) -> str:
    """By how much of the fastest step each part is longer or shorter, the largest first."""
    found = {name: (getattr(own, name) - getattr(others, name)) / whole for name in NAMES}
    ordered = sorted(found.items(), key=lambda pair: -pair[1])
    return ", ".join(
        f"{100 * change:+.1f} % {NAMES[name]}"
        for name, change in ordered
        if abs(change) >= WORTH_SAYING
    )


def _differences(layout: Layout, first: Layout) -> str:
    own, other = asdict(layout), asdict(first)
    found = [_words(name, own[name]) for name in AXES if own[name] != other[name]]
    return ", ".join(word for word in found if word)


def _words(name: str, value: object) -> str:
    match name, value:
        case "tensor_model_parallel_size", _:
            return f"tensor {value}"
        case "pipeline_model_parallel_size", _:
            return f"pipeline {value}"
        case "pipeline_model_parallel_split_rank", None:
            return ""
        case "pipeline_model_parallel_split_rank", _:
            return f"the decoder from rank {value} on"
        case "pipeline_schedule", _:
            return f"the {value} schedule"
        case "num_layers_per_virtual_pipeline_stage", None:
            return ""
        case "num_layers_per_virtual_pipeline_stage", _:
            return f"virtual stages of {value} layer{'s' * (value != 1)}"
        case "micro_batch_size", _:
            return f"micro-batches of {value}"
        case "recompute_granularity", None:
            return "no recomputation"
        case "recompute_granularity", _:
            return f"{value} recomputation"
    switch = {
        "sequence_parallel": "sequence parallelism",
        "use_distributed_optimizer": "the distributed optimizer",
        "shard_gradients": "sharded gradients",
    }[name]
    return switch if value else f"no {switch.removeprefix('the ')}"


def _remarks(found: Found, search: Search) -> list[str]:
    """What the layout rests on: where its groups lie, and what its memory rules out."""
    topology, plan = found.plan.topology, found.plan
    remarks = []
    if topology.tensor > 1:
        remarks.append(_of_nodes(topology, plan.hardware))
    chunks = plan.schedule.num_stages // topology.pipeline
    if topology.pipeline > 1:
        virtual = f" with {chunks} virtual stages" if chunks > 1 else ""
        remarks.append(f"{100 * plan.bubble:.1f} % bubble{virtual}")
    if found.layout.recompute_granularity == "full":
        more = 100 * (plan.flops / plan.model_flops - 1)
        remarks.append(f"recomputation costs {more:.0f} % more operations")
    return [*remarks, *_ruled_out(found, search)]


def _of_nodes(topology: Topology, hardware: Hardware) -> str:
    per_node = hardware.gpus_per_node
    is_inside = all(
        group[0] // per_node == group[-1] // per_node for group in topology.tensor_groups()
    )
    where = "stays inside a node" if is_inside else "crosses nodes"
    return f"tensor {topology.tensor} {where}"


def _ruled_out(found: Found, search: Search) -> list[str]:
    """The lighter ways that would not have fitted."""
    layout, words = found.layout, []
    lighter: list[tuple[str, Layout]] = []
    if layout.recompute_granularity == "full":
        lighter.append(
            ("selective recomputation", replace(layout, recompute_granularity="selective"))
        )
    if layout.recompute_granularity is not None:
        lighter.append(("no recomputation", replace(layout, recompute_granularity=None)))
    if layout.use_distributed_optimizer and not layout.shard_gradients:
        lighter.append(
            ("no distributed optimizer", replace(layout, use_distributed_optimizer=False))
        )
    for name, other in lighter:
        needed = search.too_large.get(other)
        if needed is not None:
            words.append(f"{name} would need {needed.bytes / GIB:.0f} GiB")
    return words


def summary(search: Search) -> list[str]:
    """What was tried, and what did not fit."""
    usable = search.usable / GIB
    lines = [
        f"{search.tried:,} valid layouts ({search.rejected:,} choices turned down on the way); "
        f"{len(search.too_large):,} were found not to fit {usable:.1f} GiB; "
        f"{search.composed} were composed, {search.confirmed} run dry."
    ]
    closest = search.closest
    if closest is not None:
        about = "" if closest.step == "confirmed" else "about "
        lines.append(
            f"The closest of those that do not fit needs {about}{closest.bytes / GIB:.1f} GiB, "
            f"{(closest.bytes - search.usable) / GIB:.1f} too much: "
            f"{' '.join(closest.layout.flags())}"
        )
    if not search.best:
        lines.append(
            f"Nothing fits on {search.gpus} GPUs; {search.least_gpus} would be enough."
            if search.least_gpus
            else f"Nothing fits on {search.gpus} GPUs, nor on any larger number that was tried."
        )
    return lines


def needed_gib(found: Found) -> float:
    """GiB of the fullest GPU."""
    return max(map(peak_bytes, found.plan.ranks)) / GIB
