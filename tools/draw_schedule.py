"""Draws a pipeline schedule and says what it costs.

    python tools/draw_schedule.py --schedule zb-2p --stages 4 --micro-batches 12 \
        --forward 1 --backward 1 --weight 0.8 --communication 0.05 --output schedule.png

The times are those of one micro-batch on a whole rank, in any one unit: forward pass, gradient of
the input, gradient of the weights. With `--virtual V` each of a rank's V chunks takes 1/V of them,
so that schedules with and without virtual stages are compared on the same model. A message takes
`--communication` wherever it goes from rank to rank.

    bubble             share of the cost in which a rank has nothing to do
    cost               time of a step: the longest of any rank from its first action to its last
    peak_activations   per rank, the most it holds, in forward passes (with V chunks per rank, in
                       forward passes of a chunk)

Where a schedule splits the backward pass, `--retained` of a forward pass's activations count until
the weights' gradients are computed, all of them until the backward pass. Without fused attention
that share is about 0.4 (arXiv 2401.10241), with it 0.94; 1 counts everything to the end.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import ConfigError, run_command
from megatron.pipeline.actions import Action, Kind, Schedule
from megatron.pipeline.schedule import SCHEDULES, make_schedule
from megatron.pipeline.simulator import Costs, Simulation, Span, simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Per kind the colours of the first and of the last of a rank's chunks.
COLORS = {
    Kind.FORWARD: ("#2563a8", "#a9cbee"),
    Kind.BACKWARD: ("#c2571a", "#f5c19c"),
    Kind.WEIGHT: ("#2f7d4f", "#abd9bd"),
}
INK, PAPER, IDLE, GRID = "#1d2329", "#ffffff", "#eef1f4", "#d9dde1"
ROW_HEIGHT, BAR = 0.42, 0.84  # inches; share of a row
NARROWEST, WIDEST = 8.0, 48.0  # inches
POINTS_PER_INCH = 72
# A number may fill this share of its box; a digit is about 0.6 of its size wide.
ROOM, DIGIT = 0.86, 0.6
SMALLEST_FONT, LARGEST_FONT = 3.5, 9.0


@dataclass(frozen=True)
class Drawn:
    """A schedule with its times, and what to call it."""

    title: str
    virtual: int
    schedule: Schedule
    found: Simulation

    @property
    def peaks(self) -> list[float]:
        """Per rank, as whole numbers where they are."""
        rounded = (round(peak, 6) for peak in self.found.peak_activations)
        return [int(peak) if peak.is_integer() else peak for peak in rounded]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="draw_schedule.py", description="Draw a pipeline schedule and say what it costs."
    )
    parser.add_argument("--schedule", required=True, choices=SCHEDULES)
    parser.add_argument("--stages", required=True, type=int, metavar="P", help="ranks")
    parser.add_argument(
        "--virtual", type=int, metavar="V", help="chunks per rank (default: 2 for interleaved)"
    )
    parser.add_argument("--micro-batches", required=True, type=int, metavar="M")
    parser.add_argument("--forward", type=float, default=1.0, metavar="T_F", help="default: 1")
    parser.add_argument("--backward", type=float, default=1.0, metavar="T_B", help="default: 1")
    parser.add_argument("--weight", type=float, default=1.0, metavar="T_W", help="default: 1")
    parser.add_argument(
        "--communication", type=float, default=0.0, metavar="T_C", help="default: 0"
    )
    parser.add_argument(
        "--retained",
        type=float,
        default=0.4,
        metavar="R",
        help="share of a forward pass's activations kept from B to W (default: 0.4)",
    )
    parser.add_argument("--output", type=Path, metavar="PICTURE", help="a .png, .svg or .pdf")
    parser.add_argument("--json", metavar="FILE", help="the figures as JSON; - for stdout")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError with a line for each value that is out of its range."""
    problems = []
    for name in ("stages", "micro_batches", "virtual"):
        if getattr(options, name) < 1:
            flag = "--" + name.replace("_", "-")
            problems.append(f"{flag} must be at least 1, found {getattr(options, name)}")
    for name in ("forward", "backward", "weight", "communication"):
        if not 0 <= getattr(options, name) < math.inf:
            problems.append(
                f"--{name} must be a time of at least 0, found {getattr(options, name)}"
            )
    if not problems and options.forward + options.backward + options.weight == 0:
        problems.append("--forward, --backward and --weight are all 0: there is nothing to do")
    if not 0 <= options.retained <= 1:
        problems.append(f"--retained must be from 0 to 1, found {options.retained}")
    if options.virtual > 1 and options.schedule != "interleaved":
        problems.append(f"--virtual {options.virtual} needs --schedule interleaved")
    if problems:
        raise ConfigError(problems)


def time_schedule(options: argparse.Namespace) -> Drawn:
    """Makes the schedule and times it."""
    virtual = options.virtual
    costs = Costs(
        options.forward / virtual,
        options.backward / virtual,
        options.weight / virtual,
        options.communication,
        options.retained,
    )
    schedule = make_schedule(
        options.schedule, options.stages, options.micro_batches, virtual=virtual, costs=costs
    )
    chunks = f" × {virtual} chunks" if virtual > 1 else ""
    title = (
        f"{options.schedule}, {options.stages} ranks{chunks}, {options.micro_batches} micro-batches"
    )
    return Drawn(title, virtual, schedule, simulate(schedule, costs))


def figures(drawn: Drawn, options: argparse.Namespace) -> dict[str, object]:
    """What the schedule costs, and what it was asked for."""
    asked = ("schedule", "stages", "virtual", "micro_batches", "forward", "backward", "weight")
    return {
        "bubble": drawn.found.bubble,
        "cost": drawn.found.cost,
        "peak_activations": drawn.peaks,
        **{name: getattr(options, name) for name in (*asked, "communication", "retained")},
    }


def say(drawn: Drawn) -> None:
    """Prints the figures for a reader."""
    unit = "forward passes of a chunk" if drawn.virtual > 1 else "forward passes"
    print(drawn.title)
    print(f"bubble            {drawn.found.bubble:.4f}")
    print(f"cost              {drawn.found.cost:g}")
    print(f"peak_activations  {' '.join(f'{peak:g}' for peak in drawn.peaks)}  ({unit}, by rank)")


def draw(drawn: Drawn, output: Path) -> None:
    """Writes the picture; its format is that of the file's ending."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--output needs the package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    spans, ranks = drawn.found.spans, drawn.schedule.num_ranks
    end = max(span.end for span in spans.values())
    # Wide enough for a number in a box of average length.
    average = sum(span.end - span.start for span in spans.values()) / len(spans)
    width = min(max(NARROWEST, 0.21 * end / average), WIDEST)
    figure, axes = plt.subplots(
        figsize=(width + 1.8, ROW_HEIGHT * ranks + 1.5), layout="constrained"
    )
    if output.suffix.lstrip(".").lower() not in figure.canvas.get_supported_filetypes():
        raise ConfigError(f"--output {output}: expected a picture such as .png, .svg or .pdf")
    _draw_rows(axes, drawn, inches_per_unit=width / end)
    axes.set_title(
        f"{drawn.title}: bubble {100 * drawn.found.bubble:.2f} %",
        loc="left", fontweight="bold", color=INK,
    )  # fmt: skip
    axes.set_xlim(0, end)
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.set_xlabel("time")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    _draw_legend(figure, drawn)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=160)
    plt.close(figure)


def _draw_rows(axes: Axes, drawn: Drawn, inches_per_unit: float) -> None:
    for rank, table in enumerate(drawn.schedule.ranks):
        spans = [drawn.found.spans[action] for action in table]
        begin, end = spans[0].start, spans[-1].end
        axes.barh(rank, end - begin, left=begin, height=BAR, color=IDLE, zorder=1)
        axes.barh(
            [rank] * len(table),
            [span.end - span.start for span in spans],
            left=[span.start for span in spans],
            height=BAR,
            color=[_color(drawn, action) for action in table],
            edgecolor=PAPER,
            linewidth=0.6,
            zorder=2,
        )
        for action, span in zip(table, spans, strict=True):
            _draw_number(axes, drawn, rank, action, span, inches_per_unit)
        axes.annotate(
            f"holds {drawn.peaks[rank]:g}",
            (1, rank), xycoords=("axes fraction", "data"),
            xytext=(6, 0), textcoords="offset points", va="center", fontsize=8, color=INK,
        )  # fmt: skip


def _draw_number(
    axes: Axes, drawn: Drawn, rank: int, action: Action, span: Span, inches_per_unit: float
) -> None:
    """Writes the micro-batch's number into its box, where it can be read there."""
    text = str(action.micro_batch)
    room = ROOM * (span.end - span.start) * inches_per_unit * POINTS_PER_INCH
    size = min(LARGEST_FONT, room / (DIGIT * len(text)))
    if size >= SMALLEST_FONT:
        dark = _lightness(_color(drawn, action)) > 0.55
        axes.text(
            (span.start + span.end) / 2, rank, text,
            ha="center", va="center", fontsize=size, color=INK if dark else PAPER, zorder=3,
        )  # fmt: skip


def _draw_legend(figure: Figure, drawn: Drawn) -> None:
    from matplotlib.patches import Patch

    split = any(action.kind is Kind.WEIGHT for action in drawn.schedule.actions)
    names = {
        Kind.FORWARD: "forward",
        Kind.BACKWARD: "backward: gradient of the input" if split else "backward",
        Kind.WEIGHT: "gradient of the weights",
    }
    kinds = [Kind.FORWARD, Kind.BACKWARD, *([Kind.WEIGHT] if split else [])]
    handles = [Patch(color=COLORS[kind][0], label=names[kind]) for kind in kinds]
    if drawn.virtual > 1:
        handles.append(Patch(color=COLORS[Kind.FORWARD][1], label="lighter: later chunks"))
    figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=8)


def _color(drawn: Drawn, action: Action) -> str:
    """The colour of the action's kind, lighter from chunk to chunk of a rank."""
    first, last = COLORS[action.kind]
    chunk = action.stage // drawn.schedule.num_ranks
    share = chunk / max(drawn.virtual - 1, 1)
    mixed = (
        round(a + share * (b - a)) for a, b in zip(_channels(first), _channels(last), strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _channels(color: str) -> Sequence[int]:
    return bytes.fromhex(color[1:])


def _lightness(color: str) -> float:
    """Perceived brightness, from 0 to 1."""
    red, green, blue = _channels(color)
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def main() -> None:
    """Reads the command line, prints and draws."""
    options = _parser().parse_args()
    if options.virtual is None:
        options.virtual = 2 if options.schedule == "interleaved" else 1
    check(options)
    drawn = time_schedule(options)
    if options.output is not None:
        draw(drawn, options.output)
    if options.json is not None:
        text = json.dumps(figures(drawn, options), indent=2) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
            return
        Path(options.json).write_text(text)
    say(drawn)
    for path in (options.output, options.json):
        if path is not None:
            print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
