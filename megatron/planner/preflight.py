"""All that is wrong with what a run would need on this machine, found before it is started.

1. The files that the flags name, and the tokenizer that they make.
2. The data: damage, tokens, splits, index files (`megatron.data.check`).
3. The checkpoint of --load, held against the model, which is built without memory for it.
4. Where the run writes to, and whether its checkpoints fit the disk (`megatron.planner.room`).
5. Packages that the flags ask for.

Each part is looked at whatever the others have shown, with the functions by which training itself
would find the fault, so that both say the same. Nothing is written, no GPU and no other process is
needed. What flags alone can tell is left to `megatron.validation`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron.checkpoint.directory import latest_iteration
from megatron.checkpoint.reader import load_config
from megatron.config import Config, ParallelConfig
from megatron.data.check import data_problems
from megatron.errors import ConfigError, UserError
from megatron.mpu import ParallelState
from megatron.ops import compiled, kernels
from megatron.planner.room import Start, room_problems
from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.training.checkpoints import find_start
from megatron.training.loop import sample_counts, with_vocabulary
from megatron.training.task import Task
from megatron.training.trainer import Trainer
from megatron.validation import files
from megatron.validation.checks import lines_of, mistakes_of


def preflight(
    config: Config, task: Task, world_size: int, checkpoint_bytes: int | None
) -> list[str]:
    """A line for each thing that is wrong; [] where all is well.

    Lines are to be printed behind "error: ", but for those that begin with "warning: ": training
    would start in spite of them. Without --data-path nothing is said of data. checkpoint_bytes: the
    size of one checkpoint; None leaves the disk's space out. No mistake of a user is raised.
    """
    data = config.data
    asks_for_data = bool(data.data_path)
    problems = mistakes_of(partial(_named_files, config))
    tokenizer = None
    if asks_for_data or data.vocab_file or data.merge_file or data.tokenizer_model:
        if not problems:
            tokenizer, found = _open_tokenizer(config)
            problems += found
        if tokenizer is not None:
            config, found = _with_vocabulary(config, tokenizer)
            problems += found
    replicas = _replicas(config, world_size)
    if asks_for_data:
        problems += _data(config, tokenizer, replicas)
    start, found = _find_start(config, task, replicas)
    problems += found
    problems += room_problems(config.train, replicas, start, checkpoint_bytes)
    problems += mistakes_of(partial(_packages, config))
    return list(dict.fromkeys(problems))


def on_one_rank(config: Config, data_parallel_size: int) -> Config:
    """The configuration on one rank, which takes the batch of so many data-parallel ones."""
    train = config.train
    batch = train.global_batch(data_parallel_size)
    return replace(
        config,
        parallel=ParallelConfig(),
        train=replace(train, global_batch_size=batch, cuda_graphs=False),
    )


def _named_files(config: Config) -> list[str]:
    """What is missing of the tokenizer's files; the datasets' are looked at one by one."""
    data = config.data
    checks: tuple[Callable[[], None], ...] = (
        partial(files.vocabulary_exists, data.vocab_file),
        partial(files.merge_rules_exist, data.merge_file),
        partial(files.sentence_piece_model_exists, data.tokenizer_model),
    )
    return [line for check in checks for line in mistakes_of(check)]


def _data(config: Config, tokenizer: Tokenizer | None, replicas: int) -> list[str]:
    wrong_split = mistakes_of(partial(files.split_has_weights, config.data.split))
    if wrong_split:  # then of no split samples are asked, and all else is still looked at
        config = replace(config, data=replace(config.data, split="1"))
        return wrong_split + data_problems(config, tokenizer, (0, 0, 0))
    counts = sample_counts(config, replicas)
    return data_problems(config, tokenizer, (counts.train, counts.validation, counts.test))


def _open_tokenizer(config: Config) -> tuple[Tokenizer | None, list[str]]:
    try:
        return build_tokenizer(config.data), []
    except UserError as error:
        return None, list(error.problems)


def _with_vocabulary(config: Config, tokenizer: Tokenizer) -> tuple[Config, list[str]]:
    """The configuration with the tokenizer's vocabulary, which may not fit the one stated."""
    try:
        return with_vocabulary(config, tokenizer.vocab_size), []
    except ConfigError as error:
        return config, list(error.problems)


def _replicas(config: Config, world_size: int) -> int:
    """Data-parallel ranks; where the number of ranks is wrong, which others say, 1."""
    try:
        return config.parallel.data_parallel_size(world_size)
    except ConfigError:
        return 1


def _find_start(config: Config, task: Task, replicas: int) -> tuple[Start, list[str]]:
    """From where the run goes on, and what keeps the checkpoint, or the model, from being used."""
    train = config.train
    problems = mistakes_of(lambda: files.checkpoint_directories_are_usable(train.save, train.load))
    if train.load is None or any(line.startswith("--load") for line in problems):
        return Start(), problems
    try:
        return Start(*find_start(_without_memory(config, task, replicas))), problems
    except (UserError, OSError) as error:
        return Start(), [*problems, *lines_of(error)]


def _without_memory(config: Config, task: Task, replicas: int) -> Trainer:
    """What one process would train, on a device of shapes alone."""
    model = replace(config.model, vocab_size=_vocabulary(config), fp8_format=None)
    # A checkpoint has no layout. What needs a GPU is not to be found out here.
    alone = on_one_rank(replace(config, model=model), replicas)
    return Trainer(alone, task, ParallelState.single("meta"))


def _vocabulary(config: Config) -> int:
    """The vocabulary's size; where no tokenizer tells it, what fits everything else."""
    load = None if config.train.load is None else Path(config.train.load)
    saved = None
    if config.model.vocab_size is None and load is not None and latest_iteration(load) is not None:
        saved = load_config(load).model.vocab_size
    return config.model.vocab_size or saved or 1


def _packages(config: Config) -> Iterator[str]:
    """What is not installed of what flags ask for; the tokenizer's is missed when it is opened."""
    train = config.train
    if train.tensorboard_dir is not None and importlib.util.find_spec("tensorboard") is None:
        yield "--tensorboard-dir needs the package tensorboard: pip install tensorboard"
    if train.kernels == "apex":
        yield from mistakes_of(lambda: _try(kernels.using("apex")))
    on_gpu = torch.accelerator.is_available() and not config.parallel.use_cpu
    # Where there is neither, this is a machine to plan on, and others are to compile.
    if train.compile and (on_gpu or config.parallel.use_cpu):
        device = "cuda" if on_gpu else "cpu"
        yield from mistakes_of(lambda: _try(compiled.using(True, device)))


def _try(choice: AbstractContextManager[None]) -> None:
    with choice:
        pass
