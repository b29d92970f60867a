"""Pictures of pipeline schedules: an action is a box, a rank is a row, time runs to the right.

`draw_schedule` makes a page of every action of a schedule. Its parts also make the page of a plan
(`megatron.planner.picture`).

A box carries the number of its micro-batch where there is room for it. Everything is placed in
inches from the page's upper left corner, and nothing depends on the day or the machine: the same
schedule gives the same file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from megatron.errors import ConfigError
from megatron.pipeline.actions import Action, Kind, Schedule
from megatron.pipeline.simulator import Simulation, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")

Corners = tuple[tuple[float, float], ...]

# Per kind the colours of the first and of the last of a rank's chunks.
COLORS = {
    Kind.FORWARD: ("#2563a8", "#a9cbee"),
    Kind.BACKWARD: ("#c2571a", "#f5c19c"),
    Kind.WEIGHT: ("#2f7d4f", "#abd9bd"),
}
INK, FAINT, PAPER = "#1d2329", "#5b6770", "#ffffff"
IDLE, GRID = "#eef1f4", "#d9dde1"
DOTS_PER_INCH, POINTS_PER_INCH = 160, 72
BAR = 0.84  # share of a row
LOWEST_APART = 8.0  # points of a row
# A number may fill this share of its box; a digit is about 0.6 of its size wide.
ROOM, DIGIT = 0.86, 0.6
SMALLEST_FONT, LARGEST_FONT, NORMAL_FONT = 3.5, 9.0, 8.0  # points

# All in inches.
NARROWEST, WIDEST = 8.0, 48.0
ROW = 0.42
WIDTH_OF_ACTION = 0.21  # room for a number in a box of average length
LEFT, TITLE, AXIS, LEGEND = 0.75, 0.4, 0.6, 0.3


class Box(NamedTuple):
    """A place on the page in inches, from its upper left corner."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Timed:
    """A schedule with its times."""

    schedule: Schedule
    found: Simulation
    scale: float = 1.0  # what is written on the axis for one unit of time

    @cached_property
    def end(self) -> float:
        """When the last action ends."""
        return max(span.end for span in self.found.spans.values())

    @cached_property
    def average(self) -> float:
        """How long an action takes."""
        spans = self.found.spans.values()
        return sum(span.end - span.start for span in spans) / len(spans)

    @cached_property
    def colors(self) -> dict[tuple[int, Kind], str]:
        """Per stage and kind, lighter from chunk to chunk of a rank."""
        found: dict[tuple[int, Kind], str] = {}
        for rank in range(self.schedule.num_ranks):
            stages = self.schedule.stages_of(rank)
            for chunk, stage in enumerate(stages):
                share = chunk / max(len(stages) - 1, 1)
                found |= {(stage, kind): _mixed(*COLORS[kind], share) for kind in Kind}
        return found

    @property
    def digits(self) -> int:
        """Of the longest number of a micro-batch."""
        return len(str(self.schedule.num_micro_batches - 1))

    @property
    def legend(self) -> dict[str, str]:
        """Names of the kinds of action that occur, with their colours."""
        is_split = any(action.kind is Kind.WEIGHT for action in self.schedule.actions)
        backward = "backward: gradient of the input" if is_split else "backward"
        names = {Kind.FORWARD: "forward", Kind.BACKWARD: backward}
        if is_split:
            names[Kind.WEIGHT] = "gradient of the weights"
        colors = {name: COLORS[kind][0] for kind, name in names.items()}
        if self.schedule.num_stages > self.schedule.num_ranks:
            colors["lighter: later chunks"] = COLORS[Kind.FORWARD][1]
        return colors


def check_picture(path: Path) -> None:
    """Raises ConfigError where no picture can be drawn: no matplotlib, or an unknown ending."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{path}: drawing needs the package matplotlib: pip install matplotlib"
        ) from None
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{path}: expected a picture such as .png, .svg or .pdf")


def draw_schedule(title: str, schedule: Schedule, found: Simulation, path: Path) -> None:
    """Draws every action of a schedule on a page that grows with it up to four feet.

    `found` may have its times in any unit. Behind each row stands the most that the rank holds, in
    forward passes. The ending of `path` says the format.

    Raises:
        ConfigError: the ending is none of a picture, or matplotlib is missing.
    """
    timed = Timed(schedule, found)
    width = min(max(NARROWEST, WIDTH_OF_ACTION * timed.end / timed.average), WIDEST)
    height = ROW * schedule.num_ranks
    with page(path, LEFT + width + 1.0, TITLE + height + AXIS + LEGEND) as figure:
        axes = panel(figure, Box(LEFT, TITLE, width, height))
        draw_rows(axes, timed, 0, timed.end)
        name_ranks(axes, schedule.num_ranks)
        axes.set_title(
            f"{title}: bubble {100 * found.bubble:.2f} %", loc="left", fontweight="bold", color=INK
        )
        axes.set_xlabel("time")
        for rank, peak in enumerate(found.peak_activations):
            _write_behind(axes, rank, f"holds {peak:g}")
        draw_legend(figure, timed.legend, LEFT)


@contextmanager
def page(path: Path, width: float, height: float) -> Iterator[Figure]:
    """An empty page to draw on, written to `path` at the end."""
    check_picture(path)
    from matplotlib import style
    from matplotlib.figure import Figure

    # What readers have set for pictures of their own may not change these, nor may the clock.
    with style.context(["default", {"svg.hashsalt": "schedule"}]):
        figure = Figure(figsize=(width, height), facecolor=PAPER)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata=date)


def panel(figure: Figure, box: Box) -> Axes:
    """Axes in their place, with a grid along the time and no frame."""
    width, height = figure.get_size_inches()
    bottom = height - box.top - box.height
    axes = figure.add_axes(
        (box.left / width, bottom / height, box.width / width, box.height / height)
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(labelsize=NORMAL_FONT, color=FAINT, labelcolor=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _size(axes: Axes) -> tuple[float, float]:
    """Width and height of a panel in points."""
    points = POINTS_PER_INCH / axes.figure.dpi
    return axes.bbox.width * points, axes.bbox.height * points


# Rows of actions.


def draw_rows(
    axes: Axes, timed: Timed, begin: float, end: float, *, is_overview: bool = False
) -> None:
    """Draws what the ranks do from `begin` to `end`; an overview is an image without numbers."""
    from matplotlib.collections import PolyCollection
    from matplotlib.transforms import Affine2D

    axes.set_xlim(begin * timed.scale, end * timed.scale)
    axes.set_ylim(timed.schedule.num_ranks - 0.5, -0.5)
    bar, scale = bar_height(axes, timed.schedule.num_ranks), timed.scale
    shown = [
        (rank, action, span)
        for rank, table in enumerate(timed.schedule.ranks)
        for action in table
        if (span := timed.found.spans[action]).end > begin and span.start < end
    ]
    lasting = [
        _corners(rank, timed.found.spans[table[0]].start, timed.found.spans[table[-1]].end, bar)
        for rank, table in enumerate(timed.schedule.ranks)
    ]
    in_units = Affine2D().scale(scale, 1) + axes.transData
    axes.add_collection(
        PolyCollection(lasting, facecolors=IDLE, transform=in_units, zorder=1), autolim=False
    )
    axes.add_collection(
        PolyCollection(
            [_corners(rank, span.start, span.end, bar) for rank, _, span in shown],
            facecolors=[timed.colors[action.stage, action.kind] for _, action, _ in shown],
            edgecolors="none" if is_overview else PAPER,
            linewidths=0 if is_overview else 0.6,
            # Soft edges of boxes as narrow as pixels would let the paper shine through.
            antialiaseds=not is_overview,
            rasterized=is_overview,
            transform=in_units,
            zorder=2,
        ),
        autolim=False,
    )
    if not is_overview:
        whole = [each for each in shown if each[2].start >= begin and each[2].end <= end]
        _write_numbers(axes, timed, whole)


def bar_height(axes: Axes, ranks: int) -> float:
    """The share of a row that is filled; low rows touch."""
    return BAR if _size(axes)[1] / ranks >= LOWEST_APART else 1.0


def _corners(rank: int, begin: float, end: float, bar: float) -> Corners:
    top, bottom = rank - bar / 2, rank + bar / 2
    return ((begin, top), (end, top), (end, bottom), (begin, bottom))


def _write_numbers(axes: Axes, timed: Timed, shown: Sequence[tuple[int, Action, Span]]) -> None:
    """Writes the micro-batches' numbers into their boxes, where these have room for them.

    Long boxes have numbers of the size that half of all have room for.
    """
    sizes = [_room(axes, timed, span) for _, _, span in shown]
    largest = min(LARGEST_FONT, median([s for s in sizes if s >= SMALLEST_FONT] or [0.0]))
    for (rank, action, span), size in zip(shown, sizes, strict=True):
        if size < SMALLEST_FONT:
            continue
        is_dark = _lightness(timed.colors[action.stage, action.kind]) <= 0.55
        axes.text(
            (span.start + span.end) / 2 * timed.scale, rank, str(action.micro_batch),
            ha="center", va="center_baseline", fontsize=min(size, largest),
            color=PAPER if is_dark else INK, zorder=3,
        )  # fmt: skip


def _room(axes: Axes, timed: Timed, span: Span) -> float:
    """The largest size, in points, that the longest number can have in a box."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    width, height = _size(axes)
    length = (span.end - span.start) * timed.scale / (right - left) * width
    return min(ROOM * length / (DIGIT * timed.digits), ROOM * BAR * height / (bottom - top))


def name_ranks(axes: Axes, ranks: int) -> None:
    """Labels the rows, of low ones every second, fourth, ..."""
    shown = labelled(axes, ranks)
    axes.set_yticks(shown, [f"rank {rank}" for rank in shown])


def labelled(axes: Axes, ranks: int) -> range:
    """The rows that have room for a text each."""
    every = 1
    while every * _size(axes)[1] / ranks < 1.15 * NORMAL_FONT:
        every *= 2
    return range(0, ranks, every)


def name_time(axes: Axes) -> None:
    axes.set_xlabel("time in ms", color=INK)
    axes.xaxis.set_major_formatter("{x:,g}")


def _write_behind(axes: Axes, rank: int, text: str) -> None:
    axes.annotate(
        text, (1, rank), xycoords=("axes fraction", "data"), xytext=(6, 0),
        textcoords="offset points", va="center", fontsize=NORMAL_FONT, color=INK,
    )  # fmt: skip


def draw_legend(figure: Figure, colors: Mapping[str, str], left: float) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=color, label=name) for name, color in colors.items()],
        loc="lower left", bbox_to_anchor=(left / figure.get_size_inches()[0], 0),
        ncols=len(colors), frameon=False, fontsize=NORMAL_FONT,
        borderaxespad=0.6, borderpad=0, handlelength=1.2, columnspacing=1.6,
    )  # fmt: skip


# Colours, written as #rrggbb.


def _mixed(first: str, last: str, share: float) -> str:
    pairs = zip(_channels(first), _channels(last), strict=True)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def _channels(color: str) -> bytes:
    return bytes.fromhex(color[1:])


def _lightness(color: str) -> float:
    """Perceived brightness, from 0 to 1."""
    red, green, blue = _channels(color)
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255
