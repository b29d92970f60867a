"""The picture of a plan: its step in real time and, beside it, what each rank holds in memory.

Of a schedule too long to be read on one page the whole is shown in small, and its beginning, middle
and end in large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.pipeline.actions import Action
from megatron.planner.drawing import (
    AXIS,
    DIGIT,
    FAINT,
    GRID,
    INK,
    LEFT,
    LEGEND,
    NORMAL_FONT,
    PAPER,
    POINTS_PER_INCH,
    ROOM,
    ROW,
    TITLE,
    WIDTH_OF_ACTION,
    Box,
    Timed,
    bar_height,
    draw_legend,
    draw_rows,
    labelled,
    name_ranks,
    name_time,
    page,
    panel,
)
from megatron.planner.report import (
    MEMORY,
    MEMORY_UNITS,
    batch_line,
    fits,
    layout_line,
    model_line,
    peak_bytes,
    rank_word,
    result_line,
    unit_for,
    usable_bytes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from megatron.planner.plan import Plan

REST, WRONG = "#c9ced4", "#b3261e"
WINDOW_FONT = 4.5  # points

# All in inches.
HEAD, GAP, RIGHT = 1.5, 0.45, 0.55
LOWEST_ROW, LOWEST_LARGE_ROW = 0.062, 0.125
PLAN_WIDTH, PLAN_HEIGHT, MEMORY_WIDTH, WINDOW_GAP = 14.0, 5.0, 4.6, 0.75

MEMORY_COLORS = dict(zip(MEMORY, ("#46525c", "#7d56a5", "#bda4d8", "#d9a93a"), strict=True))


def draw_plan(plan: Plan, path: Path) -> None:
    """Draws a plan: its step in milliseconds, and the memory of each pipeline rank beside it.

    The ending of `path` says the format.

    Raises:
        ConfigError: the ending is none of a picture, or matplotlib is missing.
    """
    timed = Timed(plan.schedule, plan.simulation, scale=1e3)
    ranks, rest = plan.schedule.num_ranks, max(plan.step_time - plan.simulation.cost, 0.0)
    step = timed.end + rest
    is_short = WIDTH_OF_ACTION * step / timed.average <= PLAN_WIDTH
    row = min(ROW, max(PLAN_HEIGHT / ranks, LOWEST_LARGE_ROW if is_short else LOWEST_ROW))
    large = 0.0 if is_short else max(row, LOWEST_LARGE_ROW)
    whole = Box(LEFT, HEAD, PLAN_WIDTH, max(row * ranks, 0.8))
    memory = whole._replace(left=LEFT + PLAN_WIDTH + GAP, width=MEMORY_WIDTH)
    width = memory.left + MEMORY_WIDTH + RIGHT
    below = whole.top + whole.height + AXIS  # where the enlarged windows or the legend begin
    bottom = below + (0 if is_short else TITLE + large * ranks + AXIS)
    with page(path, width, bottom + LEGEND) as figure:
        _draw_head(figure, plan)
        axes = panel(figure, whole)
        draw_rows(axes, timed, 0, step, is_overview=not is_short)
        axes.axvspan(timed.end * timed.scale, step * timed.scale, facecolor=REST, zorder=0)
        name_ranks(axes, ranks)
        name_time(axes)
        _draw_memory(panel(figure, memory), plan)
        if not is_short:
            place = Box(LEFT, below + TITLE, width - LEFT - RIGHT, large * ranks)
            _draw_windows(figure, axes, timed, place)
        outside = {"outside the pipeline: parameters, gradients, update": REST} if rest else {}
        draw_legend(figure, timed.legend | outside, LEFT)
        draw_legend(figure, MEMORY_COLORS, memory.left)


def _draw_head(figure: Figure, plan: Plan) -> None:
    """The model, its layout and the result above everything else."""
    width, height = figure.get_size_inches()
    below = 0.3
    for text, size, weight, color in (
        (model_line(plan), 14, "bold", INK),
        (f"{layout_line(plan)};  {batch_line(plan)}", 10, "normal", FAINT),
        (result_line(plan), 10, "bold", INK if fits(plan) else WRONG),
    ):
        figure.text(
            LEFT / width, 1 - below / height, text,
            fontsize=size, fontweight=weight, color=color, va="center",
        )  # fmt: skip
        below += 0.3


def _draw_memory(axes: Axes, plan: Plan) -> None:
    """A stacked bar for each rank, and the GPU's memory as a limit."""
    unit = unit_for(plan.hardware.memory, MEMORY_UNITS)
    total, usable = plan.hardware.memory / unit.size, usable_bytes(plan) / unit.size
    peaks = [peak_bytes(rank) / unit.size for rank in plan.ranks]
    bar = bar_height(axes, len(peaks))
    places, starts = range(len(peaks)), [0.0] * len(peaks)
    for name, color in MEMORY_COLORS.items():
        amounts = [getattr(rank, name) / unit.size for rank in plan.ranks]
        axes.barh(places, amounts, left=starts, height=bar, color=color, zorder=2)
        starts = [start + amount for start, amount in zip(starts, amounts, strict=True)]
    axes.axvspan(usable, total, facecolor=PAPER, edgecolor=GRID, hatch="////", zorder=1)
    axes.axvline(usable, color=WRONG, linewidth=1.2, zorder=3)
    axes.set_xlim(0, 1.14 * max(total, *peaks))
    axes.set_ylim(len(peaks) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlabel(f"memory of a {rank_word(plan)} in {unit.name}")
    axes.set_title(
        f"{usable:.1f} of {total:.1f} {unit.name} usable",
        loc="left",
        fontsize=NORMAL_FONT,
        color=INK,
    )
    for rank in labelled(axes, len(peaks)):
        axes.annotate(
            f"{peaks[rank]:,.{1 if peaks[rank] >= 10 else 2}f}", (peaks[rank], rank),
            xytext=(3, 0), textcoords="offset points", va="center", fontsize=NORMAL_FONT,
            color=INK if peaks[rank] <= usable else WRONG, zorder=4,
        )  # fmt: skip


def _draw_windows(figure: Figure, whole: Axes, timed: Timed, place: Box) -> None:
    """Three parts of the step enlarged, each framed in the picture of the whole."""
    from matplotlib.patches import Rectangle

    width = (place.width - 2 * WINDOW_GAP) / 3
    ranks = timed.schedule.num_ranks
    for i, (name, begin, end) in enumerate(_windows(timed, width)):
        left = place.left + i * (width + WINDOW_GAP)
        axes = panel(figure, place._replace(left=left, width=width))
        draw_rows(axes, timed, begin, end)
        name_ranks(axes, ranks)
        name_time(axes)
        axes.set_title(name, loc="left", fontsize=9, fontweight="bold", color=INK)
        corner, length = (begin * timed.scale, -0.5), (end - begin) * timed.scale
        whole.add_patch(
            Rectangle(
                corner, length, ranks, fill=False, edgecolor=INK, linewidth=1.2,
                zorder=5, clip_on=False,
            )
        )  # fmt: skip
        whole.annotate(
            name[0], corner, xytext=(1, 3), textcoords="offset points",
            fontsize=9, fontweight="bold", color=INK,
        )  # fmt: skip


def _windows(timed: Timed, width: float) -> Iterator[tuple[str, float, float]]:
    """Names, begins and ends of stretches whose shortest actions have room for their numbers.

    The beginning goes by the actions that ranks begin with, the end by those they end with.
    """
    room = width * POINTS_PER_INCH * ROOM / (DIGIT * timed.digits * WINDOW_FONT)
    tables, spans = timed.schedule.ranks, timed.found.spans

    def length(actions: Iterable[Action]) -> float:
        lasting = (spans[action].end - spans[action].start for action in actions)
        # A stage may be all but empty; its numbers do not make the others' parts short.
        return min(timed.end / 3, room * max(min(lasting), timed.average / 4))

    first = length(table[0] for table in tables)
    middle = length(timed.schedule.actions)
    last = length(table[-1] for table in tables)
    yield "A: beginning", 0, first
    yield "B: middle", (timed.end - middle) / 2, (timed.end + middle) / 2
    yield "C: end", timed.end - last, timed.end
