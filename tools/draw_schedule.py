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
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import ConfigError, run_command
from megatron.pipeline.actions import Schedule
from megatron.pipeline.schedule import SCHEDULES, make_schedule
from megatron.pipeline.simulator import Costs, Simulation, simulate
from megatron.planner.drawing import draw_schedule


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


def main() -> None:
    """Reads the command line, prints and draws."""
    options = _parser().parse_args()
    if options.virtual is None:
        options.virtual = 2 if options.schedule == "interleaved" else 1
    check(options)
    drawn = time_schedule(options)
    if options.output is not None:
        draw_schedule(drawn.title, drawn.schedule, drawn.found, options.output)
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
