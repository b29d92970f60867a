"""The length of the run, the growth of its batches, the learning rate and the loss scale."""

import math

from megatron.config.train import iterations_between
from megatron.errors import ConfigError
from megatron.validation.checks import Checks, exclude_each_other

checks = Checks()


@checks.add
def one_length(train_iters: int | None, train_samples: int | None) -> None:
    if train_iters is None and train_samples is None:
        raise ConfigError("--train-iters or --train-samples is required")
    if train_iters is not None and train_samples is not None:
        raise ConfigError("--train-iters and --train-samples exclude each other")


@checks.add
def ramp_counts_samples(
    rampup_batch_size: tuple[int, ...] | None, train_samples: int | None, train_iters: int | None
) -> None:
    if rampup_batch_size is None:
        return
    if len(rampup_batch_size) != 3:
        raise ConfigError(
            "--rampup-batch-size expects START INCREMENT SAMPLES, found "
            f"{' '.join(map(str, rampup_batch_size))}"
        )
    if train_iters is not None and train_samples is None:
        raise ConfigError(
            "--rampup-batch-size needs --train-samples in place of --train-iters: "
            "while batches grow, samples measure the run"
        )


@checks.add
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


@checks.add
def one_warmup(
    lr_warmup_fraction: float | None, lr_warmup_iters: int, lr_warmup_samples: int
) -> None:
    asked = {"--lr-warmup-iters": lr_warmup_iters, "--lr-warmup-samples": lr_warmup_samples}
    given = [option for option, value in asked.items() if value]
    if lr_warmup_fraction is not None and given:
        raise ConfigError(f"--lr-warmup-fraction and {' and '.join(given)} exclude each other")


@checks.add
def warmup_ends_before_decay_by_iters(
    train_iters: int | None, lr_decay_iters: int | None, lr_warmup_iters: int
) -> None:
    _warmup_fits("iters", train_iters, lr_decay_iters, lr_warmup_iters)


@checks.add
def warmup_ends_before_decay_by_samples(
    train_samples: int | None, lr_decay_samples: int | None, lr_warmup_samples: int
) -> None:
    _warmup_fits("samples", train_samples, lr_decay_samples, lr_warmup_samples)


def _warmup_fits(unit: str, length: int | None, decay: int | None, warmup: int) -> None:
    end = decay if decay is not None else length
    if length is not None and end is not None and warmup > end:
        name = f"--lr-decay-{unit}" if decay is not None else f"--train-{unit}"
        raise ConfigError(f"--lr-warmup-{unit} {warmup} is longer than the decay, {name} {end}")


@checks.add
def rates_are_ordered(lr: float, min_lr: float) -> None:
    if min_lr > lr:
        raise ConfigError(f"--min-lr {min_lr} is larger than --lr {lr}")


@checks.add
def one_source_of_the_schedule(
    override_lr_scheduler: bool, use_checkpoint_lr_scheduler: bool
) -> None:
    exclude_each_other(
        ("--override-lr-scheduler", override_lr_scheduler),
        ("--use-checkpoint-lr-scheduler", use_checkpoint_lr_scheduler),
    )


@checks.add
def profiled_iterations_are_of_the_run(profile_steps: str | None, train_iters: int | None) -> None:
    if profile_steps is None:
        return
    first = iterations_between(profile_steps).start
    if train_iters is not None and first > train_iters:
        raise ConfigError(
            f"--profile-steps {profile_steps} begins behind the last iteration, "
            f"--train-iters {train_iters}"
        )


@checks.add
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
