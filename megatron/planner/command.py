"""What a program that pretrains does with its command line: it trains, or it only plans."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron.arguments import Command
from megatron.config import Config
from megatron.config.dry_run import DryRunConfig
from megatron.errors import ConfigError, UserError
from megatron.planner.drawing import check_picture
from megatron.planner.dry_run import Recorded, put_together, record
from megatron.planner.hardware import Hardware, load_hardware
from megatron.planner.picture import draw_plan
from megatron.planner.plan import Plan
from megatron.planner.preflight import on_one_rank, preflight
from megatron.planner.report import plan_json
from megatron.planner.text import plan_text
from megatron.training import pretrain
from megatron.training.initialize import own_rank, world_size
from megatron.training.loop import with_vocabulary
from megatron.training.task import Task
from megatron.validation import files, find_problems
from megatron.validation.checks import mistakes_of
from megatron.validation.places import WARNING, why_not_writable

MakeTask = Callable[[Config], Task]

_TOKENIZER_FILES = "--tokenizer-type", "--vocab-file", "--merge-file", "--tokenizer-model"
_ITEM_SIZES = {"float64": 8, "float32": 4}


def pretrain_or_plan(command: Command, make_task: MakeTask) -> int:
    """Trains as the command line says, or with --dry-run plans it; returns the exit code.

    Of the ranks that a launcher has started one plans, and the others have nothing to do.

    Raises:
        UserError: the run is impossible.
    """
    if not command.dry_run.dry_run:
        pretrain(command.config, make_task)
        return 0
    return plan(command, make_task) if own_rank() == 0 else 0


def plan(command: Command, make_task: MakeTask) -> int:
    """Prints what a run would cost and what is wrong with it; 2 where anything is, else 0.

    What is wrong with the flags of the dry run itself is told without the work of planning. Where
    others keep a plan from being made, what else is wrong is still looked for.
    """
    wanted, run = command.dry_run, command.config
    ranks = wanted.world_size or world_size()
    problems = [*command.conflicts, *command.problems]
    hardware, own = _hardware(command)
    own += _places(wanted)
    with _shown(f"planning for {ranks} rank{'s' * (ranks > 1)} ..."):
        config, found = with_known_vocabulary(command, make_task)
        problems += own + found
        recorded = None
        if config is not None and not own:
            recorded, found = _record(config, make_task, ranks, bool(command.conflicts))
            problems += found
        size = None if recorded is None else checkpoint_bytes(recorded)
        # A model that cannot be built is not held against a checkpoint.
        looked_at = run if recorded is not None or not command.conflicts else _without_start(run)
        problems += preflight(looked_at, make_task(looked_at), ranks, size)
        made = None
        if recorded is not None and hardware is not None and not command.conflicts:
            made = put_together(recorded, hardware)
    if made is not None:
        problems += _doubts(made)
        _print(plan_text(made))
        problems += _write(made, wanted)
    return _tell(list(dict.fromkeys(problems)))


def with_known_vocabulary(command: Command, make_task: MakeTask) -> tuple[Config | None, list[str]]:
    """The configuration with the number of tokens that it states, or that its tokenizer has.

    None, and what is wrong, where there is no such number: nothing where the tokenizer's files are
    among the command's problems.
    """
    config = command.config
    lacking = any(problem.startswith(_TOKENIZER_FILES) for problem in command.problems)
    if config.data.tokenizer_type is not None and not lacking:
        try:
            return with_vocabulary(config, make_task(config).vocab_size), []
        except UserError as error:
            return None, [*error.problems]
    if config.model.vocab_size is not None:
        return config, []
    return None, [] if lacking else ["--dry-run without a tokenizer's files needs --vocab-size"]


def checkpoint_bytes(recorded: Recorded) -> int:
    """Bytes of a checkpoint: the parameters and, unless it is left out, the optimizer's state."""
    config, ranks = recorded.config, recorded.ranks
    parameters = sum(rank.parameters for rank in ranks)
    size = _ITEM_SIZES.get(config.model.dtype, 2)
    if config.train.no_save_optim:
        return parameters * size
    shards = recorded.topology.data if config.parallel.use_distributed_optimizer else 1
    weights = sum(rank.weights for rank in ranks)
    state = shards * sum(rank.optimizer for rank in ranks)
    return round(parameters * size * (1 + state / weights))


def _hardware(command: Command) -> tuple[Hardware | None, list[str]]:
    """The hardware, or what is wrong with it: it has to know the formats that are computed with."""
    model = command.config.model
    try:
        hardware = load_hardware(command.dry_run.hardware)
    except ConfigError as error:
        return None, [*error.problems]
    formats = [model.dtype] + ["float8"] * (model.fp8_format is not None)
    checks = [partial(_has_rate, hardware, each) for each in formats]
    return hardware, [line for check in checks for line in mistakes_of(check)]


def _has_rate(hardware: Hardware, number_format: str) -> None:
    hardware.peak_flops(number_format)


def _places(wanted: DryRunConfig) -> list[str]:
    """What is wrong with the files that are to be written."""
    problems = []
    for option, name in _files(wanted).items():
        path = Path(name)
        if path.is_dir():
            problems.append(f"{option} {name} is a directory, expected a file")
            continue
        if option == "--dry-run-picture":
            problems += (f"{option} {line}" for line in mistakes_of(partial(check_picture, path)))
        reason = why_not_writable(path.parent)
        if path.exists():
            reason = None if os.access(path, os.W_OK) else f"{path} is not writable"
        if reason is not None:
            problems.append(f"{option} {name}: {reason}")
    return problems


def _files(wanted: DryRunConfig) -> dict[str, str]:
    """The files that are to be written, by the flags that name them."""
    named = {
        "--dry-run-json": wanted.dry_run_json,
        "--dry-run-picture": wanted.dry_run_picture,
    }
    return {option: name for option, name in named.items() if name is not None}


def _record(
    config: Config, make_task: MakeTask, ranks: int, has_conflicts: bool
) -> tuple[Recorded | None, list[str]]:
    """What the ranks do, or what is wrong.

    Where flags exclude each other, one rank alone tells how large the model is, for the sake of its
    checkpoints; nothing, where the model itself is impossible.
    """
    if has_conflicts:
        config, ranks = on_one_rank(config, 1), 1
        if config.train.save is None or _is_impossible(config):
            return None, []
    try:
        return record(config, make_task, ranks), []
    except UserError as error:
        return None, [*error.problems]


def _is_impossible(config: Config) -> bool:
    return bool(find_problems(config.to_flags(), 1, leaving_out=files.checks))


def _without_start(config: Config) -> Config:
    return replace(config, train=replace(config.train, load=None, rampup_batch_size=None))


def _doubts(made: Plan) -> Iterator[str]:
    """What makes the figures of a plan other than one might think."""
    parallel, hardware = made.config.parallel, made.hardware
    if parallel.use_cpu:
        yield (
            f"{WARNING}--use-cpu: bytes and communication are those of CPUs, times and the limit "
            f"of memory those of --hardware {hardware.name}"
        )
    tensor, hub = parallel.tensor_model_parallel_size, hardware.gpus_per_node
    if made.topology.world_size > hub and hub % tensor:
        yield (
            f"{WARNING}--tensor-model-parallel-size {tensor} and {hub} GPUs in a node of "
            f"{hardware.name}: tensor ranks on different nodes wait for the network in every layer"
        )


def _print(text: str) -> None:
    """Prints to stdout, of which a reader may take as much as it likes."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        # What is left of it would fail once more at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, "stdout") from None


def _write(made: Plan, wanted: DryRunConfig) -> list[str]:
    """Writes the files that are asked for; returns what has gone wrong."""
    problems = []
    for option, name in _files(wanted).items():
        path = Path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if option == "--dry-run-json":
                text = json.dumps(plan_json(made), indent=2, allow_nan=False)
                path.write_text(text + "\n", encoding="utf-8")
            else:
                with _shown("drawing ..."):
                    draw_plan(made, path)
        except OSError as error:
            problems.append(f"{option} {name}: {error.strerror}")
    return problems


@contextmanager
def _shown(text: str) -> Iterator[None]:
    """Shows, where stderr is a terminal, what is being done until it is done."""
    is_seen = sys.stderr is not None and sys.stderr.isatty()
    if is_seen:
        print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if is_seen:
            print("\r" + " " * len(text), end="\r", file=sys.stderr, flush=True)


def _tell(problems: list[str]) -> int:
    """Prints warnings, then errors; returns the exit code."""
    warnings = [problem for problem in problems if problem.startswith(WARNING)]
    errors = [problem for problem in problems if problem not in warnings]
    for line in (*warnings, *(f"error: {error}" for error in errors)):
        print(line, file=sys.stderr)
    return 2 if errors else 0
