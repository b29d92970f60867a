"""Every combination of flags that is impossible, found before any work starts.

A check is a function whose parameters are named after the flags it looks at (and `world_size`); it
raises ConfigError with one line for each problem, in the flags' own names. A check is left out
while one of its flags is missing or wrong in itself, so that one mistake gives one message.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.config import Config, ParallelConfig, TrainConfig, all_flags
from megatron.errors import ConfigError

Check = Callable[..., None]
CHECKS: list[Check] = []


def validate(config: Config, world_size: int) -> list[str]:
    """All problems of a configuration that is to run on `world_size` ranks."""
    return find_problems(config.to_flags(), world_size)


def find_problems(values: Mapping[str, Any], world_size: int) -> list[str]:
    """All problems among the flags that could be read; `values` may lack some."""
    problems: list[str] = []
    sound: dict[str, Any] = {"world_size": world_size}
    for flag in all_flags().values():
        if flag.name in values:
            found = list(flag.problems(values[flag.name]))
            problems += found
            if not found:
                sound[flag.name] = values[flag.name]
    for check in CHECKS:
        wanted = inspect.signature(check).parameters
        if wanted.keys() <= sound.keys():
            try:
                check(**{name: sound[name] for name in wanted})
            except ConfigError as error:
                problems += error.problems
    return problems


def _check(function: Check) -> Check:
    CHECKS.append(function)
    return function


# The network


@_check
def heads_share_the_width(
    hidden_size: int, num_attention_heads: int, kv_channels: int | None
) -> None:
    if kv_channels is None and hidden_size % num_attention_heads:
        raise ConfigError(
            f"--hidden-size {hidden_size} is not divisible by "
            f"--num-attention-heads {num_attention_heads}: "
            "state the width of a head with --kv-channels"
        )


@_check
def positions_suffice(seq_length: int, max_position_embeddings: int) -> None:
    if seq_length > max_position_embeddings:
        raise ConfigError(
            f"--seq-length {seq_length} is larger than "
            f"--max-position-embeddings {max_position_embeddings}"
        )


@_check
def one_precision(fp16: bool, bf16: bool, fp64: bool) -> None:
    asked = {"--fp16": fp16, "--bf16": bf16, "--fp64": fp64}
    given = [option for option, value in asked.items() if value]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other")


# The layout


@_check
def heads_split_over_tensor_ranks(
    num_attention_heads: int, tensor_model_parallel_size: int
) -> None:
    if num_attention_heads % tensor_model_parallel_size:
        raise ConfigError(
            f"--num-attention-heads {num_attention_heads} is not divisible by "
            f"--tensor-model-parallel-size {tensor_model_parallel_size}"
        )


@_check
def mlp_splits_over_tensor_ranks(
    ffn_hidden_size: int | None, hidden_size: int, tensor_model_parallel_size: int
) -> None:
    width = ffn_hidden_size or 4 * hidden_size
    if width % tensor_model_parallel_size:
        stated = f"--ffn-hidden-size {width}" if ffn_hidden_size else f"4 x --hidden-size = {width}"
        raise ConfigError(
            f"{stated} is not divisible by "
            f"--tensor-model-parallel-size {tensor_model_parallel_size}"
        )


@_check
def layers_fill_the_stages(
    num_layers: int, pipeline_model_parallel_size: int, pipeline_layers: tuple[int, ...] | None
) -> None:
    ParallelConfig(
        pipeline_model_parallel_size=pipeline_model_parallel_size, pipeline_layers=pipeline_layers
    ).stage_layers(num_layers)


@_check
def ranks_hold_whole_models(
    tensor_model_parallel_size: int, pipeline_model_parallel_size: int, world_size: int
) -> None:
    ParallelConfig(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
    ).data_parallel_size(world_size)


@_check
def batch_is_whole(
    micro_batch_size: int,
    global_batch_size: int | None,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    world_size: int,
) -> None:
    data, rest = divmod(world_size, tensor_model_parallel_size * pipeline_model_parallel_size)
    if data and not rest:  # otherwise the check above speaks
        TrainConfig(
            micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        ).num_micro_batches(data)


@_check
def backend_suits_the_device(distributed_backend: str | None, use_cpu: bool) -> None:
    if use_cpu and distributed_backend == "nccl":
        raise ConfigError("--distributed-backend nccl needs GPUs, --use-cpu uses none")


# The length of the run and the learning rate


@_check
def one_length(train_iters: int | None, train_samples: int | None) -> None:
    if train_iters is None and train_samples is None:
        raise ConfigError("--train-iters or --train-samples is required")
    if train_iters is not None and train_samples is not None:
        raise ConfigError("--train-iters and --train-samples exclude each other")


@_check
def schedule_counts_like_the_run(
    train_iters: int | None,
    train_samples: int | None,
    lr_decay_iters: int | None,
    lr_decay_samples: int | None,
    lr_warmup_iters: int,
    lr_warmup_samples: int,
) -> None:
    if (train_iters is None) == (train_samples is None):
        return  # the check above speaks
    run, other = ("iters", "samples") if train_samples is None else ("samples", "iters")
    by_iters = {"--lr-decay-iters": lr_decay_iters, "--lr-warmup-iters": lr_warmup_iters}
    by_samples = {"--lr-decay-samples": lr_decay_samples, "--lr-warmup-samples": lr_warmup_samples}
    strangers = by_samples if run == "iters" else by_iters
    given = [option for option, value in strangers.items() if value]
    if given:
        raise ConfigError(
            f"{option} counts {other}, but the run is counted by --train-{run}: "
            f"use {option.replace(other, run)}"
            for option in given
        )


@_check
def one_warmup(
    lr_warmup_fraction: float | None, lr_warmup_iters: int, lr_warmup_samples: int
) -> None:
    asked = {"--lr-warmup-iters": lr_warmup_iters, "--lr-warmup-samples": lr_warmup_samples}
    given = [option for option, value in asked.items() if value]
    if lr_warmup_fraction is not None and given:
        raise ConfigError(f"--lr-warmup-fraction and {' and '.join(given)} exclude each other")


@_check
def warmup_ends_before_decay_by_iters(
    train_iters: int | None, lr_decay_iters: int | None, lr_warmup_iters: int
) -> None:
    _warmup_fits("iters", train_iters, lr_decay_iters, lr_warmup_iters)


@_check
def warmup_ends_before_decay_by_samples(
    train_samples: int | None, lr_decay_samples: int | None, lr_warmup_samples: int
) -> None:
    _warmup_fits("samples", train_samples, lr_decay_samples, lr_warmup_samples)


def _warmup_fits(unit: str, length: int | None, decay: int | None, warmup: int) -> None:
    end = decay if decay is not None else length
    if length is not None and end is not None and warmup > end:
        name = f"--lr-decay-{unit}" if decay is not None else f"--train-{unit}"
        raise ConfigError(f"--lr-warmup-{unit} {warmup} is longer than the decay, {name} {end}")


@_check
def rates_are_ordered(lr: float, min_lr: float) -> None:
    if min_lr > lr:
        raise ConfigError(f"--min-lr {min_lr} is larger than --lr {lr}")


@_check
def one_source_of_the_schedule(
    override_lr_scheduler: bool, use_checkpoint_lr_scheduler: bool
) -> None:
    if override_lr_scheduler and use_checkpoint_lr_scheduler:
        raise ConfigError(
            "--override-lr-scheduler and --use-checkpoint-lr-scheduler exclude each other"
        )


@_check
def loss_scales_are_exact(
    loss_scale: float | None, initial_loss_scale: float, min_loss_scale: float
) -> None:
    scales = {
        "--loss-scale": loss_scale,
        "--initial-loss-scale": initial_loss_scale,
        "--min-loss-scale": min_loss_scale,
    }
    problems = [
        f"{option} {value} is not a power of two, so scaling by it would round"
        for option, value in scales.items()
        if value is not None and math.frexp(value)[0] != 0.5
    ]
    if min_loss_scale > initial_loss_scale:
        problems.append(
            f"--min-loss-scale {min_loss_scale} is larger than "
            f"--initial-loss-scale {initial_loss_scale}"
        )
    if problems:
        raise ConfigError(problems)


# Files


@_check
def dataset_exists(data_path: tuple[str, ...]) -> None:
    if len(data_path) > 1:
        raise ConfigError(
            f"--data-path expects the prefix of one dataset, found {len(data_path)} values"
        )
    for prefix in data_path:
        if prefix.endswith((".idx", ".bin")):
            raise ConfigError(
                f"--data-path {prefix} is a file: give its path without {prefix[-4:]}"
            )
        missing = [
            f"--data-path {prefix}: {prefix}{suffix} does not exist"
            for suffix in (".idx", ".bin")
            if not Path(prefix + suffix).is_file()
        ]
        if missing:
            raise ConfigError(missing)


@_check
def vocabulary_exists(vocab_file: str | None) -> None:
    _must_be_a_file("--vocab-file", vocab_file)


@_check
def merge_rules_exist(merge_file: str | None) -> None:
    _must_be_a_file("--merge-file", merge_file)


def _must_be_a_file(option: str, path: str | None) -> None:
    if path is not None and not Path(path).is_file():
        state = "is no file" if Path(path).exists() else "does not exist"
        raise ConfigError(f"{option} {path} {state}")


@_check
def tokenizer_has_its_files(
    tokenizer_type: str | None, vocab_file: str | None, merge_file: str | None
) -> None:
    if tokenizer_type is not None and vocab_file is None:
        raise ConfigError(f"--tokenizer-type {tokenizer_type} needs --vocab-file")
    if tokenizer_type == "GPT2BPETokenizer" and merge_file is None:
        raise ConfigError(f"--tokenizer-type {tokenizer_type} needs --merge-file")


@_check
def split_has_weights(split: str) -> None:
    weights = [part.strip() for part in re.split("[,/]", split)]
    if (
        len(weights) > 3
        or not all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) for weight in weights)
        or sum(map(float, weights)) == 0
    ):
        raise ConfigError(
            f"--split {split!r}: expected up to three weights, for training, validation and test, "
            'such as "969, 30, 1"'
        )


@_check
def checkpoint_directories_are_usable(save: str | None, load: str | None) -> None:
    problems = [
        f"{option} {path} is a file, not a directory"
        for option, path in (("--save", save), ("--load", load))
        if path is not None and Path(path).is_file()
    ]
    # The first start of a run that saves and loads in one place finds nothing there yet.
    if load is not None and load != save and not Path(load).exists():
        problems.append(f"--load {load} does not exist")
    if problems:
        raise ConfigError(problems)


@_check
def saving_has_a_place(save: str | None, save_interval: int | None) -> None:
    if save_interval is not None and save is None:
        raise ConfigError("--save-interval needs --save")


@_check
def finetuning_has_a_start(finetune: bool, load: str | None) -> None:
    if finetune and load is None:
        raise ConfigError("--finetune needs --load")
