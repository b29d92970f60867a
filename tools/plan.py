"""Finds the fastest layouts of a model on a cluster, without a GPU.

    python tools/plan.py --model gpt-18b --gpus 256 --hardware h100-sxm
    python tools/plan.py --model llama-70b --gpus 64 --global-batch-size 256 --seq-length 4096
    python tools/plan.py --config-file run.yaml --model-type gpt --gpus 64 --hardware a100-80gb

`--model` is the name of a launch script: gpt-18b is what examples/gpt/18b.sh trains. Any other
model is described by the flags of pretrain_*.py, on the command line or in `--config-file`. All of
these flags can stand beside `--model`, too.

Tensor and pipeline sizes, virtual stages, schedule, micro-batch, recomputation, sequence
parallelism and the spread of optimizer and gradients are searched. Where one of them stands on the
command line, it is fixed (`none` where a flag has no value, as in --recompute-granularity none);
those of a launch script or a file are left out. The global batch stays what it is.

Each layout is printed with its predicted figures, the reason why it is as fast as it is, and the
flags to paste. The figures are those of `--dry-run`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.arguments import read_config
from megatron.config import Config, all_flags
from megatron.errors import ConfigError, run_command
from megatron.old_flags import OLD_FLAGS, Renamed, StandsFor
from megatron.planner.hardware import GIB, load_hardware, names
from megatron.planner.layouts import AXES, COMPANIONS
from megatron.planner.models import model_words
from megatron.planner.reasons import needed_gib, reason, summary
from megatron.planner.report import (
    WIDTH,
    batch_size,
    model_line,
    plan_json,
    seconds_text,
    tokens_per_step,
    virtual_stages,
)
from megatron.planner.search import SHOWN, Found, Search, search
from megatron.tokenizer import build_tokenizer
from megatron.training import BertPretraining, GPTPretraining, T5Pretraining
from megatron.training.loop import with_vocabulary
from megatron.training.task import Task

TASKS: dict[str, Callable[[Config], Task]] = {
    "bert": BertPretraining,
    "gpt": GPTPretraining,
    "t5": T5Pretraining,
}
OF_LAYOUT = (*AXES, *COMPANIONS)
RECOMPUTED = {None: "none", "selective": "selective", "full": "full"}


@dataclass(frozen=True)
class Wanted:
    """What is to be planned: a configuration, and the values of a layout that are fixed."""

    base: Config
    fixed: dict[str, Any]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="plan.py",
        description="Find the fastest layouts of a model on a cluster. All flags of "
        "pretrain_*.py can be given, too.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="a launch script's, such as gpt-18b or bert-345m")
    parser.add_argument("--gpus", type=int, required=True, metavar="N")
    parser.add_argument(
        "--hardware",
        default="h100-sxm",
        metavar="NAME|FILE",
        help=f"{', '.join(names())} or a YAML file (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-margin",
        type=float,
        default=0.0,
        metavar="GIB",
        help="of each GPU to be left free beyond what is reserved anyway (default: 0)",
    )
    parser.add_argument(
        "--best",
        type=int,
        default=SHOWN,
        metavar="N",
        help="layouts to find (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write what was found as JSON")
    return parser


def main() -> int:
    """From the command line to the table; 1 where nothing fits."""
    options, words = _parser().parse_known_args()
    for name in ("gpus", "best"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} expects a number from 1 on")
    hardware = load_hardware(options.hardware)
    wanted = read_wanted(words, options.model)
    found = search(
        wanted.base,
        TASKS[wanted.base.model.model_type],
        options.gpus,
        hardware,
        fixed=wanted.fixed,
        margin=round(options.memory_margin * GIB),
        wanted=options.best,
        say=lambda line: print(f"plan.py: {line}", file=sys.stderr, flush=True),
    )
    print("\n".join(report(found)))
    if options.json:
        text = json.dumps(as_json(found), indent=1)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return 0 if found.best else 1


def read_wanted(words: Sequence[str], model: str | None) -> Wanted:
    """The model and batch that a command line describes, and what it says of the layout.

    Raises:
        ConfigError: everything that is wrong with its flags, or the model is unknown.
    """
    kind, of_model = (None, []) if model is None else model_words(model)
    of_model = _other_flags(_flags(of_model), ("dry_run", "world_size"))
    given = _flags(words)
    defaults: dict[str, Any] = {"lr": 1e-4}
    if kind is not None:
        defaults["model_type"] = kind
    elif not {"train_samples", "config_file"} & {name for name, _ in given}:
        defaults["train_iters"] = 1
    with tempfile.TemporaryDirectory() as folder:
        # A later file wins: it takes back what the user's file says of the layout.
        plain = Path(folder) / "layout.yaml"
        plain.write_text(yaml.safe_dump(_plain_layout()), encoding="utf-8")
        argv = [*of_model, *_other_flags(given), "--config-file", str(plain)]
        config, _ = read_config(argv, defaults=defaults)
    fixed = _fixed(given)
    companions = {name: fixed.pop(name) for name in COMPANIONS if name in fixed}
    return Wanted(
        _with_vocabulary(replace(config, parallel=replace(config.parallel, **companions))), fixed
    )


def _flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Field names with their words; old names of a layout's flags become new ones."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append((name.replace("-", "_"), [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ConfigError(f"expected a flag, found {word!r}")
    return [each for name, values in found for each in _current(name, values)]


def _current(name: str, values: list[str]) -> list[tuple[str, list[str]]]:
    match None if name in all_flags() else OLD_FLAGS.get(name.replace("_", "-")):
        case Renamed() as old if old.to.replace("-", "_") in OF_LAYOUT:
            implied = [(other.replace("-", "_"), [value]) for other, value in old.also.items()]
            return [*implied, (old.to.replace("-", "_"), values)]
        case StandsFor() as old if {n.replace("-", "_") for n in old.flags} <= set(OF_LAYOUT):
            return [(other.replace("-", "_"), [value]) for other, value in old.flags.items()]
    return [(name, values)]


def _other_flags(flags: Sequence[tuple[str, list[str]]], more: tuple[str, ...] = ()) -> list[str]:
    """The words of all flags that are no layout's."""
    return [
        word
        for name, values in flags
        if name not in (*OF_LAYOUT, *more)
        for word in ("--" + name.replace("_", "-"), *values)
    ]


def _plain_layout() -> dict[str, Any]:
    flags = all_flags()
    values = {name: flags[name].default for name in OF_LAYOUT if not flags[name].required}
    return {name.replace("_", "-"): value for name, value in values.items()} | {
        "micro-batch-size": 1
    }


def _fixed(given: Sequence[tuple[str, list[str]]]) -> dict[str, Any]:
    flags, found, problems = all_flags(), dict[str, Any](), list[str]()
    for name, words in given:
        if name in OF_LAYOUT:
            try:
                is_none = flags[name].optional and words == ["none"]
                found[name] = None if is_none else flags[name].read(list(words))
                problems += flags[name].problems(found[name])
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def _with_vocabulary(config: Config) -> Config:
    if config.model.vocab_size is not None:
        return config
    data = config.data
    if not (data.vocab_file or data.merge_file or data.tokenizer_model):
        raise ConfigError("--vocab-size is required, or the tokenizer's files")
    return with_vocabulary(config, build_tokenizer(data).vocab_size)


# What is printed.


def report(found: Search) -> list[str]:
    """The lines of the table, of the reasons and of what was tried."""
    lines = []
    if found.best:
        first = found.best[0].plan
        lines += _wrapped(model_line(first), 2)
        lines.append(f"{found.gpus} x {found.hardware.name}, batch {batch_size(first)}")
        lines += [
            "",
            *_table([_header(), *map(_row, range(1, 1 + len(found.best)), found.best)]),
            "",
        ]
    for place, each in enumerate(found.best, 1):
        lines += _wrapped(f"{place:2}. {reason(each, found)}", 4)
        lines += [f"    {' '.join(each.layout.flags())}", ""]
    for line in summary(found):
        lines += _wrapped(line, 2)
    return lines


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False
    )


def _header() -> list[str]:
    return [
        *("", "step", "tokens/s", "TFLOP/s", "MFU %", "GiB", "bubble %", "t", "p", "v", "d", "mb"),
        *("recompute", "sp", "opt", "schedule"),
    ]


def _row(place: int, found: Found) -> list[str]:
    plan, layout = found.plan, found.layout
    topology = plan.topology
    spread = "2" if layout.shard_gradients else "1" if layout.use_distributed_optimizer else "-"
    return [
        str(place),
        seconds_text(plan.step_time),
        f"{tokens_per_step(plan) / plan.step_time / topology.world_size:,.0f}",
        f"{plan.tflops_per_gpu:.1f}",
        f"{100 * plan.mfu:.1f}",
        f"{needed_gib(found):.1f}",
        f"{100 * plan.bubble:.1f}",
        *map(str, (topology.tensor, topology.pipeline, virtual_stages(plan), topology.data)),
        str(layout.micro_batch_size),
        RECOMPUTED[layout.recompute_granularity],
        "yes" if layout.sequence_parallel else "-",
        spread,
        layout.pipeline_schedule if topology.pipeline > 1 else "-",
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def as_json(found: Search) -> dict[str, Any]:
    """What was found as plain values; of each layout `layout`, `flags`, `reason` and its `plan`."""
    closest = found.closest
    return {
        "gpus": found.gpus,
        "hardware": found.hardware.name,
        "usable_bytes": found.usable,
        "valid_layouts": found.tried,
        "too_large": len(found.too_large),
        "confirmed": found.confirmed,
        "least_gpus": found.least_gpus,
        "closest": closest and {"flags": closest.layout.flags(), "bytes": closest.bytes},
        "best": [
            {
                "layout": asdict(each.layout),
                "flags": each.layout.flags(),
                "reason": reason(each, found),
                "plan": plan_json(each.plan),
            }
            for each in found.best
        ],
    }


if __name__ == "__main__":
    run_command(main)
