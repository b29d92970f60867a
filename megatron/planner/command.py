"""What a program that pretrains does with its command line: it trains, or it only plans."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from megatron.arguments import Command
from megatron.config import Config
from megatron.errors import ConfigError, UserError
from megatron.planner.dry_run import dry_run
from megatron.planner.hardware import Hardware, load_hardware
from megatron.planner.picture import check_picture, draw_plan
from megatron.planner.plan import Plan
from megatron.planner.preflight import preflight
from megatron.planner.report import plan_json, print_plan
from megatron.training import pretrain
from megatron.training.initialize import own_rank, world_size
from megatron.training.loop import with_vocabulary
from megatron.training.task import Task

MakeTask = Callable[[Config], Task]

_TOKENIZER_FILES = "--tokenizer-type", "--vocab-file", "--merge-file", "--tokenizer-model"
_ITEM_SIZES = {"float64": 8, "float32": 4}


def pretrain_or_plan(command: Command, make_task: MakeTask) -> int:
    """Trains as the command line says, or with --dry-run plans it; returns the exit code.

    Raises:
        UserError: the run, or the plan, is impossible.
    """
    if not command.dry_run.dry_run:
        pretrain(command.config, make_task)
        return 0
    return plan(command, make_task) if own_rank() == 0 else 0


def plan(command: Command, make_task: MakeTask) -> int:
    """Prints what a run would cost and what is wrong with it; 2 where anything is, else 0.

    Raises:
        UserError: no plan can be made, for these reasons and what else is wrong.
    """
    wanted = command.dry_run
    ranks = wanted.world_size or world_size()
    problems = list(command.problems)
    made = None
    try:
        hardware = _ready(command)
        config = with_known_vocabulary(command, make_task)
        if config is not None:
            made = dry_run(config, make_task, ranks, hardware)
    except UserError as error:
        problems += error.problems
    found = preflight(
        command.config,
        make_task(command.config),
        ranks,
        None if made is None else checkpoint_bytes(made),
    )
    problems = list(dict.fromkeys(problems + found))
    if made is not None:
        print_plan(made, sys.stdout)
        sys.stdout.flush()
        _write(made, wanted.dry_run_json, wanted.dry_run_picture)
    return _tell(problems)


def with_known_vocabulary(command: Command, make_task: MakeTask) -> Config | None:
    """The configuration with the number of tokens that it states, or that its tokenizer has.

    None where the tokenizer's files are among the problems and no number is stated.

    Raises:
        ConfigError: neither is there, or the tokenizer has more than is stated.
        DataError: the tokenizer cannot be read.
    """
    config = command.config
    lacking = any(problem.startswith(_TOKENIZER_FILES) for problem in command.problems)
    if config.data.tokenizer_type is not None and not lacking:
        return with_vocabulary(config, make_task(config).vocab_size)
    if config.model.vocab_size is not None:
        return config
    if lacking:
        return None
    raise ConfigError("--dry-run without a tokenizer's files needs --vocab-size")


def checkpoint_bytes(made: Plan) -> int:
    """Bytes of a checkpoint: the parameters and, unless it is left out, the optimizer's state."""
    config = made.config
    size = _ITEM_SIZES.get(config.model.dtype, 2)
    if config.train.no_save_optim:
        return made.parameters * size
    shards = made.topology.data if config.parallel.use_distributed_optimizer else 1
    weights = sum(rank.weights for rank in made.ranks)
    state = shards * sum(rank.optimizer for rank in made.ranks)
    return round(made.parameters * size * (1 + state / weights))


def _ready(command: Command) -> Hardware:
    """The hardware; what is to be written can be.

    Raises:
        ConfigError: there is no such hardware, or a picture cannot be drawn.
    """
    if command.dry_run.dry_run_picture is not None:
        check_picture(Path(command.dry_run.dry_run_picture))
    return load_hardware(command.dry_run.hardware)


def _write(made: Plan, json_file: str | None, picture: str | None) -> None:
    if json_file is not None:
        text = json.dumps(plan_json(made), indent=2, allow_nan=False)
        Path(json_file).write_text(text + "\n", encoding="utf-8")
    if picture is not None:
        draw_plan(made, Path(picture))


def _tell(problems: list[str]) -> int:
    warnings = [problem for problem in problems if problem.startswith("warning: ")]
    errors = [problem for problem in problems if problem not in warnings]
    sys.stderr.writelines(f"{line}\n" for line in warnings)
    sys.stderr.writelines(f"error: {line}\n" for line in errors)
    return 2 if errors else 0
