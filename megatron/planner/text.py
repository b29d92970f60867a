"""A plan as text for a terminal of 100 columns.

It begins with the model, the cluster and the batch,

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
from itertools import groupby
from typing import TYPE_CHECKING

from megatron.planner.report import (
    COUNT_UNITS,
    FLOP_UNITS,
    MEMORY,
    MEMORY_UNITS,
    SECONDS_PER_DAY,
    TERA,
    WIDTH,
    Unit,
    batch_line,
    executed_tflops,
    fit_line,
    in_units,
    layout_line,
    model_line,
    peak_bytes,
    rank_word,
    seconds_text,
    steps_of_run,
    tokens_per_step,
    unit_for,
    usable_bytes,
)

if TYPE_CHECKING:
    from megatron.planner.plan import CommunicationTotal, Plan, RankPlan

# More lines than this are folded further; more columns go into another table, or are left out.
MOST_LINES, COLUMNS, MOST_COLUMNS = 16, 3, 6
LONGEST_PLACES = 13
LONG_TIME_UNITS = (
    Unit("days", SECONDS_PER_DAY),
    Unit("hours", 3600),
    Unit("minutes", 60),
    Unit("seconds", 1),
)


def plan_text(plan: Plan) -> str:
    """The plan as lines of up to 100 columns."""
    head = [model_line(plan), layout_line(plan), batch_line(plan)]
    blocks = [
        [line for long in head for line in _wrapped(long)],
        _memory_lines(plan),
        *_communication_blocks(plan),
        _step_lines(plan),
        textwrap.wrap(_basis(plan), WIDTH),
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


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
                in_units(fullest.parameters, COUNT_UNITS),
                *(f"{amount / unit.size:,.2f}" for amount in amounts),
                "fits" if spare >= 0 else f"{-spare:,.2f} over",
            ]
        )
    note = "Ranks that differ in nothing but activations share a line, which shows the fullest."
    whole = " (parameters: of its tensor ranks together)" if plan.topology.tensor > 1 else ""
    return [
        f"Memory of a {rank_word(plan)} in {unit.name}, by rank of the pipeline{whole}",
        *_table(rows, align="<<>"),
        *([] if is_short else [note]),
        fit_line(plan),
    ]


def _parts(rank: RankPlan) -> tuple[int, ...]:
    return tuple(getattr(rank, name) for name in MEMORY)


def _communication_blocks(plan: Plan) -> list[list[str]]:
    """Tables of what the ranks send, with a pair of columns for each distinct kind of rank."""
    folded = _folded(plan.ranks, lambda rank: rank.communications)
    title = f"Communication of a {rank_word(plan)} in a step, by rank of the pipeline"
    if not any(rank.communications for rank in plan.ranks):
        return [[f"No communication: one {rank_word(plan)} has all."]]
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
    rate = f"TFLOP/s per {rank_word(plan)}"
    rows = [
        ["time", seconds_text(plan.step_time), f"{tokens:,.0f} tokens/s"],
        [
            "bubble",
            f"{100 * plan.bubble:.1f} %",
            f"of the pipeline's time, in which a {rank_word(plan)} waits for others",
        ],
        ["model", in_units(plan.model_flops, FLOP_UNITS), "without recomputation"],
        ["", f"{plan.tflops_per_gpu:,.1f} {rate}", f"MFU {100 * plan.mfu:.1f} % of {peak:,.0f}"],
        ["executed", in_units(plan.flops, FLOP_UNITS), f"{more:+.1f} % to the model's"],
        ["", f"{executed_tflops(plan):,.1f} {rate}", ""],
    ]
    rows[3][2] += f" in {dtype}"
    steps = steps_of_run(plan)
    if steps is not None:
        full = "full " if plan.config.train.rampup_batch_size else ""
        note = f"for {steps:,} {full}steps; no evaluation, no checkpoints"
        rows.append(["whole run", _long_time(steps * plan.step_time), note])
    split = [[name, *figure.split(" ", 1), note] for name, figure, note in rows]
    return ["A step", *_table(split, align="<><<")]


def _long_time(seconds: float) -> str:
    return in_units(seconds, LONG_TIME_UNITS, 1)


def _basis(plan: Plan) -> str:
    """What the figures rest on."""
    hardware = plan.hardware
    return (
        "What this rests on: parameters, bytes and communication were recorded while the code of "
        "training ran for every distinct kind of rank, without a device. Bytes of communication "
        "are those of the tensor handed in, of an all-gather those of its result. Times are "
        f"predicted from the description of {hardware.name}. Of its "
        f"{in_units(hardware.memory, MEMORY_UNITS)}, "
        f"{in_units(hardware.reserved, MEMORY_UNITS)} are set aside for CUDA, NCCL and "
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
