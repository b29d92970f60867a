"""What a plan says: as text for a terminal of 100 columns, and as JSON for programs.

The text begins with the model, the cluster and the batch,

    GPT, 1,008.0 B parameters: 128 layers, hidden 25600, 160 heads, sequence 2048, vocabulary 51200
    3072 x a100-80gb, 384 nodes: tensor 8 x pipeline 64 x data 6
    batch 3072 = data 6 x 512 micro-batches of 1; 1f1b schedule; float16, full recomputation

goes on with two tables, of what the ranks of the pipeline hold and of what they send, and ends with
what a step costs. Neighbouring ranks that are alike share a line or a column. It needs no colours.

This file imports no torch.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

if TYPE_CHECKING:
    from megatron.planner.plan import CommunicationTotal, Plan, RankPlan

# What a rank's memory is made of: names of a RankPlan's fields, in bytes.
MEMORY = ("weights", "gradients", "optimizer", "activations")
WIDTH = 100
# More lines than this are folded further; more columns go into another table, or are left out.
MOST_LINES, COLUMNS, MOST_COLUMNS = 16, 3, 6
LONGEST_PLACES = 13
TERA, SECONDS_PER_DAY = 1e12, 86400


class Unit(NamedTuple):
    """A unit that amounts are written in."""

    name: str
    size: float


MEMORY_UNITS = (Unit("GiB", 2**30), Unit("MiB", 2**20), Unit("KiB", 2**10))
FLOP_UNITS = tuple(
    Unit(f"{p}FLOP", 10.0**e) for p, e in zip("ZEPTG", (21, 18, 15, 12, 9), strict=True)
)
COUNT_UNITS = (Unit("B", 1e9), Unit("M", 1e6), Unit("K", 1e3))


def unit_for(largest: float, units: Sequence[Unit]) -> Unit:
    """The largest unit that does not exceed `largest`; the smallest where none does."""
    return next((unit for unit in units if largest >= unit.size), units[-1])


def _in_units(amount: float, units: Sequence[Unit], digits: int = 2) -> str:
    unit = unit_for(amount, units)
    return f"{amount / unit.size:,.{digits}f} {unit.name}"


# The figures that text, JSON and picture share.


def peak_bytes(rank: RankPlan) -> int:
    """The most bytes that a rank holds at once."""
    return rank.weights + rank.gradients + rank.optimizer + rank.activations


def usable_bytes(plan: Plan) -> int:
    """Bytes of a GPU that tensors can have."""
    return plan.hardware.memory - plan.hardware.reserved


def virtual_stages(plan: Plan) -> int:
    """Stages that each rank of the pipeline holds."""
    return plan.schedule.num_stages // plan.schedule.num_ranks


def fits(plan: Plan) -> bool:
    """Whether every rank fits its GPU."""
    return all(peak_bytes(rank) <= usable_bytes(plan) for rank in plan.ranks)


def batch_size(plan: Plan) -> int:
    """Samples of a step."""
    return plan.config.train.micro_batch_size * plan.micro_batches * plan.topology.data


def tokens_per_step(plan: Plan) -> int:
    """Tokens of a step, padding included; of an encoder-decoder, of both sequences."""
    data = plan.config.data
    has_target = plan.config.model.model_type == "t5"
    return batch_size(plan) * (data.seq_length + (data.decoder_length if has_target else 0))


def steps_of_run(plan: Plan) -> int | None:
    """Steps of the whole run, as if its batch were full from the start; None where not stated."""
    train = plan.config.train
    if train.train_samples is not None:
        return math.ceil(train.train_samples / batch_size(plan))
    return train.train_iters


def _executed_tflops(plan: Plan) -> float:
    return plan.flops / plan.step_time / plan.topology.world_size / TERA


# The head lines, which are also those of the picture.


def model_line(plan: Plan) -> str:
    """The model with its size."""
    model, data = plan.config.model, plan.config.data
    layers, length = str(model.num_layers), str(data.seq_length)
    if model.model_type == "t5":
        layers, length = f"{layers} + {model.decoder_layers}", f"{length} + {data.decoder_length}"
    return (
        f"{model.model_type.upper()}, {_in_units(plan.parameters, COUNT_UNITS, 1)} parameters: "
        f"{layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads, "
        f"sequence {length}, vocabulary {model.vocab_size}"
    )


def layout_line(plan: Plan) -> str:
    """The cluster and how the model is spread over it."""
    topology, hardware = plan.topology, plan.hardware
    nodes = math.ceil(topology.world_size / hardware.gpus_per_node)
    chunks = virtual_stages(plan)
    virtual = f" x virtual {chunks}" if chunks > 1 else ""
    return (
        f"{topology.world_size} x {hardware.name}, {nodes} node{'s' * (nodes > 1)}: "
        f"tensor {topology.tensor} x pipeline {topology.pipeline}{virtual} x data {topology.data}"
    )


def batch_line(plan: Plan) -> str:
    """The batch, the schedule, and the switches that change what a step costs."""
    parallel, train = plan.config.parallel, plan.config.train
    switches = {
        plan.config.model.dtype: True,
        f"{parallel.recompute_granularity} recomputation": parallel.recompute_granularity,
        "sequence parallel": parallel.sequence_parallel,
        "distributed optimizer": parallel.use_distributed_optimizer,
        "sharded gradients": parallel.shard_gradients,
    }
    return (
        f"batch {batch_size(plan)} = data {plan.topology.data} x {plan.micro_batches} "
        f"micro-batches of {train.micro_batch_size}; {parallel.schedule} schedule; "
        + ", ".join(name for name, is_on in switches.items() if is_on)
    )


def result_line(plan: Plan) -> str:
    """What a step costs, and whether it fits."""
    return (
        f"step {seconds_text(plan.step_time)}, bubble {100 * plan.bubble:.1f} %, "
        f"{plan.tflops_per_gpu:,.1f} TFLOP/s per GPU, MFU {100 * plan.mfu:.1f} %; {fit_line(plan)}"
    )


def fit_line(plan: Plan) -> str:
    """Whether the fullest rank fits, and what is left or missing."""
    fullest = max(plan.ranks, key=peak_bytes)
    needed, usable = peak_bytes(fullest), usable_bytes(plan)
    unit = unit_for(needed, MEMORY_UNITS)
    verdict, left = ("fits", "left") if needed <= usable else ("does not fit", "too much")
    return (
        f"{verdict}: rank {fullest.rank} needs {needed / unit.size:,.2f} of "
        f"{usable / unit.size:,.2f} {unit.name}, {abs(usable - needed) / unit.size:,.2f} {left}"
    )


def seconds_text(seconds: float) -> str:
    """A time with its unit."""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:,.2f} ms"


# The text.


def print_plan(plan: Plan, out: TextIO) -> None:
    """Writes the plan to `out` as text, in lines of up to 100 columns."""
    head = [model_line(plan), layout_line(plan), batch_line(plan)]
    blocks = [
        [line for long in head for line in _wrapped(long)],
        _memory_lines(plan),
        *_communication_blocks(plan),
        _step_lines(plan),
        textwrap.wrap(_basis(plan), WIDTH),
    ]
    out.write("\n\n".join("\n".join(block) for block in blocks) + "\n")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False)


def _memory_lines(plan: Plan) -> list[str]:
    """The table of what each rank holds, and the verdict."""
    folded = _folded(plan.ranks, lambda rank: (rank.parameters, *_parts(rank)))
    is_short = len(folded) <= MOST_LINES
    if not is_short:
        folded = _folded(plan.ranks, lambda rank: (rank.parameters, *_parts(rank)[:-1]))
    usable = usable_bytes(plan)
    unit = unit_for(max(map(peak_bytes, plan.ranks)), MEMORY_UNITS)
    header = ["ranks", "stages", "parameters", *MEMORY, "sum", f"of {usable / unit.size:,.1f}"]
    rows = [header]
    for group in folded:
        fullest = max(group, key=peak_bytes)
        spare = (usable - peak_bytes(fullest)) / unit.size
        amounts = (*_parts(fullest), peak_bytes(fullest))
        rows.append(
            [
                _places(rank.rank for rank in group),
                _places(stage for rank in group for stage in rank.stages),
                _in_units(fullest.parameters, COUNT_UNITS),
                *(f"{amount / unit.size:,.2f}" for amount in amounts),
                "fits" if spare >= 0 else f"{-spare:,.2f} over",
            ]
        )
    note = "Ranks that differ in nothing but activations share a line, which shows the fullest."
    whole = " (parameters: of its tensor ranks together)" if plan.topology.tensor > 1 else ""
    return [
        f"Memory of a GPU in {unit.name}, by rank of the pipeline{whole}",
        *_table(rows, align="<<>"),
        *([] if is_short else [note]),
        fit_line(plan),
    ]


def _parts(rank: RankPlan) -> tuple[int, ...]:
    return tuple(getattr(rank, name) for name in MEMORY)


def _communication_blocks(plan: Plan) -> list[list[str]]:
    """Tables of what the ranks send, with a pair of columns for each distinct kind of rank."""
    folded = _folded(plan.ranks, lambda rank: rank.communications)
    title = "Communication of a GPU in a step, by rank of the pipeline"
    if not any(rank.communications for rank in plan.ranks):
        return [["No communication: one GPU has all."]]
    if len(folded) > MOST_COLUMNS:
        title += f"; of {len(folded)} kinds of ranks the one that moves the most"
        folded = [max(folded, key=lambda group: sum(c.bytes for c in group[0].communications))]
    most = math.ceil(len(folded) / math.ceil(len(folded) / COLUMNS))
    first, *others = (
        _communication_table(folded[i : i + most]) for i in range(0, len(folded), most)
    )
    return [[title, *first], *others]


def _communication_table(folded: Sequence[Sequence[RankPlan]]) -> list[str]:
    def key(total: CommunicationTotal) -> tuple[str, int, str]:
        return total.group, total.ranks, total.kind

    columns = [{key(total): total for total in group[0].communications} for group in folded]
    keys = dict.fromkeys(each for column in columns for each in column)
    largest = max((t.bytes for column in columns for t in column.values()), default=0)
    unit = unit_for(largest, MEMORY_UNITS)
    names = [f"rank{'s' * (len(group) > 1)} {_places(r.rank for r in group)}" for group in folded]
    rows = [["", "", ""], ["group", "kind", "GPUs"]]
    for name in names:
        rows[0] += ["", name]
        rows[1] += ["calls", unit.name]
    for each in keys:
        group, ranks, kind = each
        rows.append([group, kind, str(ranks)])
        for column in columns:
            total = column.get(each)
            rows[-1] += (
                [f"{total.count:,}", _amount(total.bytes / unit.size)] if total else ["-", "-"]
            )
    return _table(rows, align="<<>")


def _amount(amount: float) -> str:
    return "<0.01" if 0 < amount < 0.005 else f"{amount:,.2f}"


def _step_lines(plan: Plan) -> list[str]:
    """What a step costs, one line for each figure."""
    dtype = plan.config.model.dtype
    peak = plan.hardware.peak_flops(dtype) / TERA
    more = 100 * (plan.flops / plan.model_flops - 1)
    tokens = tokens_per_step(plan) / plan.step_time
    rate = "TFLOP/s per GPU"
    rows = [
        ["time", seconds_text(plan.step_time), f"{tokens:,.0f} tokens/s"],
        [
            "bubble",
            f"{100 * plan.bubble:.1f} %",
            "of the pipeline's time, in which a GPU waits for others",
        ],
        ["model", _in_units(plan.model_flops, FLOP_UNITS), "without recomputation"],
        ["", f"{plan.tflops_per_gpu:,.1f} {rate}", f"MFU {100 * plan.mfu:.1f} % of {peak:,.0f}"],
        ["executed", _in_units(plan.flops, FLOP_UNITS), f"{more:+.1f} % to the model's"],
        ["", f"{_executed_tflops(plan):,.1f} {rate}", ""],
    ]
    rows[3][2] += f" in {dtype}"
    steps = steps_of_run(plan)
    if steps is not None:
        ramp = ", the batch full from the start" if plan.config.train.rampup_batch_size else ""
        note = f"for {steps:,} steps{ramp}; evaluation and checkpoints left out"
        rows.append(["whole run", _long_time(steps * plan.step_time), note])
    split = [[name, *figure.split(" ", 1), note] for name, figure, note in rows]
    return ["A step", *_table(split, align="<><<")]


def _long_time(seconds: float) -> str:
    units = (Unit("days", SECONDS_PER_DAY), Unit("hours", 3600), Unit("minutes", 60))
    return _in_units(seconds, units, 1)


def _basis(plan: Plan) -> str:
    """What the figures rest on."""
    hardware = plan.hardware
    return (
        "What this rests on: parameters, bytes and communication were recorded while the code of "
        "training ran for every distinct kind of rank, without a device. Bytes of communication "
        "are those of the tensor handed in, of an all-gather those of its result. Times are "
        f"predicted from the description of {hardware.name}. Of its "
        f"{_in_units(hardware.memory, MEMORY_UNITS)}, "
        f"{_in_units(hardware.reserved, MEMORY_UNITS)} are set aside for CUDA, NCCL and "
        "fragmentation. Operations are those of matrix products, two for each multiply and add, "
        "and causal attention counts as if every position saw every other."
    )


def _folded(
    ranks: Iterable[RankPlan], likeness: Callable[[RankPlan], Hashable]
) -> list[list[RankPlan]]:
    """Runs of neighbours that are alike."""
    return [list(group) for _, group in groupby(ranks, likeness)]


def _places(numbers: Iterable[int]) -> str:
    """Numbers as ranges, `1-6, 9-14`; where those are long, the first and the last."""
    ordered = sorted(numbers)
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])
    ]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    text = ", ".join(texts)
    return text if len(text) <= LONGEST_PLACES else f"{texts[0]} .. {texts[-1]}"


def _table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Lines with aligned columns; `align` has a < or > for each, the last for all further ones."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = align.ljust(len(widths), align[-1])
    return [
        "  ".join(
            f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


# The JSON.


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as texts, finite numbers, lists and None; a number's unit ends its key's name.

    Operations are counted as `_flops`, rates in `_tflops_per_second`, shares from 0 to 1, and what
    has no unit is a count. The keys:

        model          type, layers, decoder_layers (None but for T5), hidden_size, attention_heads,
                       sequence_length, decoder_sequence_length, vocab_size, dtype, parameters
        cluster        hardware, gpus, gpus_per_node, memory_bytes, reserved_bytes (of them, for
                       CUDA, NCCL and fragmentation), peak_tflops_per_second (of a GPU, in dtype)
        layout         tensor, pipeline, virtual, data, schedule, micro_batches, micro_batch_size,
                       global_batch_size, sequence_parallel, distributed_optimizer,
                       recompute_granularity
        fits           whether every rank does
        ranks          a list, one entry per pipeline rank: rank, stages, parameters, weights_bytes,
                       gradients_bytes, optimizer_bytes, activations_bytes, peak_bytes, fits,
                       communications: a list of group, kind, ranks, count, bytes
        step           seconds, pipeline_seconds (of them, the schedule's), bubble, tokens,
                       tokens_per_second, model_flops, executed_flops (with recomputation),
                       model_tflops_per_second_per_gpu, executed_tflops_per_second_per_gpu, mfu
        run            steps, seconds, days; None where the run's length is not stated
        config         every flag, by section, as `Config.to_dict`; the schedule follows from it

    `ranks` of a communication are the size of its group, its bytes those of all calls together.
    """
    return {
        "model": _model_json(plan),
        "cluster": _cluster_json(plan),
        "layout": _layout_json(plan),
        "fits": fits(plan),
        "ranks": [_rank_json(rank, usable_bytes(plan)) for rank in plan.ranks],
        "step": _step_json(plan),
        "run": _run_json(plan),
        "config": plan.config.to_dict(),
    }


def _model_json(plan: Plan) -> dict[str, Any]:
    model, data = plan.config.model, plan.config.data
    is_t5 = model.model_type == "t5"
    return {
        "type": model.model_type,
        "layers": model.num_layers,
        "decoder_layers": model.decoder_layers if is_t5 else None,
        "hidden_size": model.hidden_size,
        "attention_heads": model.num_attention_heads,
        "sequence_length": data.seq_length,
        "decoder_sequence_length": data.decoder_length if is_t5 else None,
        "vocab_size": model.vocab_size,
        "dtype": model.dtype,
        "parameters": plan.parameters,
    }


def _cluster_json(plan: Plan) -> dict[str, Any]:
    hardware = plan.hardware
    return {
        "hardware": hardware.name,
        "gpus": plan.topology.world_size,
        "gpus_per_node": hardware.gpus_per_node,
        "memory_bytes": hardware.memory,
        "reserved_bytes": hardware.reserved,
        "peak_tflops_per_second": hardware.peak_flops(plan.config.model.dtype) / TERA,
    }


def _layout_json(plan: Plan) -> dict[str, Any]:
    parallel = plan.config.parallel
    return {
        "tensor": plan.topology.tensor,
        "pipeline": plan.topology.pipeline,
        "virtual": virtual_stages(plan),
        "data": plan.topology.data,
        "schedule": parallel.schedule,
        "micro_batches": plan.micro_batches,
        "micro_batch_size": plan.config.train.micro_batch_size,
        "global_batch_size": batch_size(plan),
        "sequence_parallel": parallel.sequence_parallel,
        "distributed_optimizer": parallel.use_distributed_optimizer,
        "recompute_granularity": parallel.recompute_granularity,
    }


def _rank_json(rank: RankPlan, usable: int) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "stages": list(rank.stages),
        "parameters": rank.parameters,
        **{f"{name}_bytes": getattr(rank, name) for name in MEMORY},
        "peak_bytes": peak_bytes(rank),
        "fits": peak_bytes(rank) <= usable,
        "communications": [asdict(total) for total in rank.communications],
    }


def _step_json(plan: Plan) -> dict[str, Any]:
    tokens = tokens_per_step(plan)
    return {
        "seconds": plan.step_time,
        "pipeline_seconds": plan.simulation.cost,
        "bubble": plan.bubble,
        "tokens": tokens,
        "tokens_per_second": tokens / plan.step_time,
        "model_flops": plan.model_flops,
        "executed_flops": plan.flops,
        "model_tflops_per_second_per_gpu": plan.tflops_per_gpu,
        "executed_tflops_per_second_per_gpu": _executed_tflops(plan),
        "mfu": plan.mfu,
    }


def _run_json(plan: Plan) -> dict[str, Any] | None:
    steps = steps_of_run(plan)
    if steps is None:
        return None
    seconds = steps * plan.step_time
    return {"steps": steps, "seconds": seconds, "days": seconds / SECONDS_PER_DAY}
