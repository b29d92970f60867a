"""Proves that a layout trains the same model as one process, for the user's own configuration.

    python tools/prove_parity.py --model gpt --ranks 8 [the flags of pretrain_gpt.py]

1. The flags are read as the pretraining program would read them, and changed only where asked
   (`--layers`, `--hidden`, `--dtype`), and where a comparison needs it: dropout off, no warm-up.
   What was changed is said.
2. One process trains a few steps, then as many processes as the layout wants, on the same data:
   random tokens, or those of `--data-path`.
3. Losses, gradient norms, the layers' outputs and the gradients of the first step, and the weights
   before it and after the last are compared, as whole tensors by name. Copies of a tensor on
   several ranks must be bitwise equal.

Ends with 0 where all agree within the tolerance, with 1 where they do not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.arguments import read_config
from megatron.errors import run_command
from tools.parity.changes import PRECISIONS, Wish, comparable, one_process
from tools.parity.comparison import Row, Tolerances, compare
from tools.parity.processes import record_in_processes

DEFAULTS: dict[str, dict[str, object]] = {
    "bert": {"model_type": "bert"},
    "gpt": {"model_type": "gpt"},
    "t5": {"model_type": "t5", "vocab_extra_ids": 100},
}

TOLERANCES = {
    "fp64": Tolerances(output=1e-11, loss=1e-11, norm=1e-11, gradient=1e-11, weight=1e-11),
    "fp32": Tolerances(output=1e-5, loss=1e-5, norm=1e-5, gradient=1e-5, weight=1e-4),
    "bf16": Tolerances(output=5e-2, loss=1e-2, norm=5e-2, gradient=1e-1, weight=1e-1),
}


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This tool's own arguments, and the flags that are left for the pretraining program."""
    parser = argparse.ArgumentParser(
        description="Prove that a layout trains the same model as one process.",
        epilog="All other flags are those of pretrain_MODEL.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", choices=sorted(DEFAULTS), default="gpt", help="default gpt")
    parser.add_argument(
        "--ranks",
        type=int,
        help="processes of the layout, as given to torchrun (default: the fewest for the tensor "
        "and pipeline sizes on the command line, or 2 data-parallel ones)",
    )
    parser.add_argument("--layers", type=int, help="number of layers in place of the flags'")
    parser.add_argument("--hidden", type=int, help="hidden size in place of the flags'")
    parser.add_argument("--steps", type=int, default=5, help="steps to train (default 5)")
    parser.add_argument(
        "--dtype",
        choices=list(PRECISIONS),
        default="fp64",
        help="number format (default fp64, in which rounding hides no mistake)",
    )
    arguments, flags = parser.parse_known_args(argv)
    for name in ("ranks", "layers", "hidden", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: found {value}, expected at least 1")
    if arguments.ranks is None:
        arguments.ranks = _fewest_ranks(flags)
    return arguments, flags


def _fewest_ranks(flags: Sequence[str]) -> int:
    """The processes of one copy of the model, or where that is one, of two copies."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    sizes = [f"--{axis}-model-parallel-size" for axis in ("tensor", "pipeline")]
    for size in sizes:
        parser.add_argument(size, type=int, default=1, dest=size)
    try:
        found = vars(parser.parse_known_args(flags)[0])
    except argparse.ArgumentError:
        return 1  # whoever reads the configuration says what is wrong with it
    return max(2, prod(found.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print the table; 0 where all agree, 1 where they do not."""
    arguments, flags = parse_arguments(argv)
    ranks: int = arguments.ranks
    defaults = DEFAULTS[arguments.model]
    config, notes = read_config(flags, defaults=defaults, world_size=ranks)
    wish = Wish(arguments.layers, arguments.hidden, arguments.dtype)
    config, changes = comparable(config, wish, ranks)
    for note in (*notes, *changes):
        print(f"note: {note}")
    expected = record_in_processes(one_process(config, ranks), 1, arguments.steps)
    found = record_in_processes(config, ranks, arguments.steps)
    rows = compare(found, expected, TOLERANCES[arguments.dtype])
    print(table(rows))
    agrees = all(row.agrees for row in rows)
    print(
        f"{arguments.model} on {ranks} ranks, {arguments.steps} steps in {arguments.dtype}: "
        f"{'the same as' if agrees else 'NOT the same as'} one process"
    )
    return 0 if agrees else 1


def table(rows: Sequence[Row]) -> str:
    """The comparison as aligned text."""
    cells = [("", "difference", "tolerance", "", "where")]
    cells += (
        (
            row.quantity,
            f"{row.difference:.1e}",
            f"{row.tolerance:.0e}",
            "ok" if row.agrees else "WRONG",
            row.where,
        )
        for row in rows
    )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    run_command(main)
