"""One training step of a GPT on two cores: this project and others, on one process and on two.

All train the same network from the same weights on the same batches and apply the same update; the
first two losses must agree, which holds them to that. On one process a step may use two threads,
on two processes each uses one. A pipeline cuts the batch into micro-batches.

One layout after another is measured, each in rounds together with all that run on one process. The
ratios of a round compare bursts that ran seconds apart; a figure is the median over rounds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contest import Contestant, Team, measure
from benchmarks.peers.matmul import FLOPS
from benchmarks.peers.sizes import LAYOUTS, Sizes

OURS = "this_project"
TITLES = {
    OURS: "this project",
    "transformers_gpt2": "transformers",
    "megatron_core": "megatron-core",
    "plain_torch": "plain PyTorch",
}
PEERS = tuple(module for module in TITLES if module != OURS)
LAYOUT_TITLES = {
    "single": "1 process, 2 threads",
    "tp": "tensor 2",
    "tp-sp": "tensor 2 + sequence",
    "pp": "pipeline 2",
    "dp": "data 2",
}
PRODUCTS = ("blas", "onednn")
# Losses of float32 runs from equal weights; the first is of the forward pass alone.
LOSS_TOLERANCE = 1e-4


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure and print; the figures."""
    sizes = Sizes(
        hidden=args.hidden_size,
        layers=args.num_layers,
        heads=args.num_attention_heads,
        sequence=args.seq_length,
        vocabulary=args.vocab_size,
        batch=args.batch_size,
        micro_batches=args.micro_batches,
    )
    contestants = [
        Contestant(module, layout, *((1, 2) if layout == "single" else (2, 1)))
        for layout in LAYOUTS
        for module in TITLES
        if layout in args.layouts
        and module in (OURS, *args.peers)
        and (module != "transformers_gpt2" or layout == "single")
    ]
    products = [Contestant("matmul", kind, 1, 2) for kind in PRODUCTS]
    single = [each for each in contestants if each.layout == "single"]
    others = [layout for layout in args.layouts if layout != "single"]
    with ExitStack() as stack:
        references = start(stack, (*single, *products), sizes, console)
        for section, layout in enumerate(others or ["single"]):
            members = [each for each in contestants if each.layout == layout != "single"]
            # The processes of a layout end before the next one's begin: memory is short.
            with ExitStack() as own:
                teams = references + start(own, members, sizes, console)
                rounds = range(section * args.rounds + 1, (section + 1) * args.rounds + 1)
                measure(
                    teams,
                    rounds,
                    args.steps,
                    lambda number: console.print(f"round {number}", style="dim"),
                )
    present = [each for each in contestants if each.absent is None]
    check_losses(present)
    result = figures(sizes, present, [each for each in products if each.absent is None])
    result["absent"] = {each.name: each.absent for each in contestants if each.absent is not None}
    show(result, console)
    return result


def start(
    stack: ExitStack, contestants: Sequence[Contestant], sizes: Sizes, console: Console
) -> list[Team]:
    """The teams of those that can be built here; `stack` ends them."""
    names = ", ".join(each.name for each in contestants)
    console.print(f"starting {names}", style="dim")
    teams = [stack.enter_context(Team(each, sizes)) for each in contestants]
    for team in teams:
        team.ready()
    return [team for team in teams if team.contestant.absent is None]


def check_losses(contestants: Sequence[Contestant]) -> None:
    """Ends the program where contestants do not train the same thing."""
    reference = contestants[0].losses
    for each in contestants:
        difference = max(abs(a - b) for a, b in zip(each.losses, reference, strict=True))
        if difference > LOSS_TOLERANCE:
            sys.exit(f"{each.name} has the losses {each.losses}, not {reference}")


def figures(
    sizes: Sizes, contestants: Sequence[Contestant], products: Sequence[Contestant]
) -> dict[str, Any]:
    """Medians over rounds of all that is reported."""
    limit = min(products, key=lambda each: statistics.median(each.seconds.values()))
    single = {each.module: each for each in contestants if each.layout == "single"}
    rows = []
    for each in contestants:
        peers = [p for p in contestants if p.layout == each.layout and p.module != OURS]
        best = min(peers, key=lambda p: statistics.median(p.seconds.values()), default=None)
        row: dict[str, Any] = {
            "layout": each.layout,
            "contestant": TITLES[each.module],
            "tokens_per_second": sizes.tokens / statistics.median(each.seconds.values()),
            "seconds": {
                "median": statistics.median(each.seconds.values()),
                "quartiles": statistics.quantiles(each.seconds.values(), n=4)[::2],
            },
            "peak_mib_per_process": each.peak / 2**20,
            "share_of_matmul_rate": speed(limit, each) * sizes.flops / FLOPS,
            "first_losses": each.losses,
        }
        if best is not None:
            row["ratio_to_best_peer"] = speed(best, each)
        if OURS in single:
            row["ratio_to_our_single"] = speed(single[OURS], each)
        if each.module in single:
            row["ratio_to_own_single"] = speed(single[each.module], each)
        rows.append(row)
    return {
        "rows": rows,
        "sizes": vars(sizes) | {"stage_layers": sizes.stage_layers},
        "matmul_gflops": {
            each.layout: FLOPS / statistics.median(each.seconds.values()) / 1e9 for each in products
        },
        "rounds_per_layout": min(len(each.seconds) for each in contestants),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }


def speed(reference: Contestant, contestant: Contestant) -> float:
    """How much faster a contestant is: the median of the ratios within a round."""
    common = reference.seconds.keys() & contestant.seconds.keys()
    return statistics.median(reference.seconds[i] / contestant.seconds[i] for i in common)


def show(result: dict[str, Any], console: Console) -> None:
    """Print the figures as a table."""
    table = Table(
        "layout",
        "",
        "tokens/s",
        "seconds a step",
        "to best peer",
        "to own single",
        "to our single",
        "of matmul",
        "MiB/process",
    )
    last = None
    for row in result["rows"]:
        ratios = (
            f"{row[key]:.3f}" if key in row else "–"
            for key in ("ratio_to_best_peer", "ratio_to_own_single", "ratio_to_our_single")
        )
        low, high = row["seconds"]["quartiles"]
        if last not in (None, row["layout"]):
            table.add_section()
        table.add_row(
            LAYOUT_TITLES[row["layout"]] if row["layout"] != last else "",
            row["contestant"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['seconds']['median']:.3f} ({low:.3f}–{high:.3f})",
            *ratios,
            f"{row['share_of_matmul_rate']:.0%}",
            f"{row['peak_mib_per_process']:.0f}",
        )
        last = row["layout"]
    console.print(table)
    sizes, rates = result["sizes"], result["matmul_gflops"]
    console.print(
        f"GPT of {sizes['layers']} layers, hidden {sizes['hidden']}, {sizes['heads']} heads, "
        f"vocabulary {sizes['vocabulary']}, float32; {sizes['batch']} sequences of "
        f"{sizes['sequence']} tokens a step, in a pipeline {sizes['micro_batches']} micro-batches; "
        f"median (quartiles) of {result['rounds_per_layout']} rounds; matmul "
        + ", ".join(f"{kind} {rate:.0f}" for kind, rate in rates.items())
        + " GFLOP/s"
    )
    for name, reason in result["absent"].items():
        console.print(f"absent: {name}: {reason}")
