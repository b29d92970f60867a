"""The learning rate as a function of the samples consumed so far.

Linear warm-up from 0 to ``peak``, then decay to ``floor``, which is reached after ``decay`` samples
and kept. Lengths given in iterations become samples by the global batch size, so that one formula
serves both ways of stating a run. There is no state: whoever knows the number of consumed samples
knows the rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.config import Config
from megatron.errors import ConfigError

Plain = float | int | str

# Which flags a user has to look at when a checkpoint's value differs from the run's.
_FLAGS = {
    "peak": "--lr",
    "floor": "--min-lr",
    "style": "--lr-decay-style",
    "warmup": "--lr-warmup-fraction, --lr-warmup-iters or --lr-warmup-samples (in samples)",
    "decay": "--lr-decay-iters or --lr-decay-samples (in samples)",
}


@dataclass(frozen=True)
class LearningRateSchedule:
    """The course of the learning rate.

    Attributes:
        peak: rate at the end of warm-up.
        floor: rate at the end of decay.
        style: ``constant``, ``linear`` or ``cosine``.
        warmup: samples of warm-up.
        decay: samples at which decay ends, warm-up included.
    """

    peak: float
    floor: float
    style: str
    warmup: int
    decay: int

    def rate(self, samples: int) -> float:
        """The rate of the step that starts after ``samples`` samples have been consumed."""
        if samples < self.warmup:
            return self.peak * samples / self.warmup
        if self.style == "constant":
            return self.peak
        if samples >= self.decay:
            return self.floor
        progress = (samples - self.warmup) / (self.decay - self.warmup)
        if self.style == "linear":
            remaining = 1 - progress
        else:
            remaining = (1 + math.cos(math.pi * progress)) / 2
        return self.floor + remaining * (self.peak - self.floor)

    def state_dict(self) -> dict[str, Plain]:
        """The schedule as plain values, for a checkpoint."""
        return dataclasses.asdict(self)

    def resumed(
        self, saved: Mapping[str, Plain], *, override: bool, use_checkpoint: bool
    ) -> LearningRateSchedule:
        """The schedule to follow when a run goes on from a checkpoint that holds ``saved``.

        This one with ``override``, the saved one with ``use_checkpoint``; with neither, the two
        must be equal.

        Raises:
            ConfigError: they are not; one line for each difference.
        """
        if override:
            return self
        if use_checkpoint:
            return LearningRateSchedule(**saved)  # type: ignore[arg-type]
        problems = [
            f"{_FLAGS[name]}: the checkpoint has {saved[name]}, the flags give {own}; "
            "pass --override-lr-scheduler to follow the flags or --use-checkpoint-lr-scheduler "
            "to follow the checkpoint"
            for name, own in self.state_dict().items()
            if saved[name] != own
        ]
        if problems:
            raise ConfigError(problems)
        return self


def build_schedule(config: Config, global_batch_size: int) -> LearningRateSchedule:
    """The schedule of ``config``; the decay lasts as long as the run where it is not stated.

    Raises:
        ConfigError: the warm-up outlasts the decay.
    """
    options, train = config.optimizer, config.train
    if train.train_samples is not None:
        decay = options.lr_decay_samples or train.train_samples
        warmup = options.lr_warmup_samples
    else:
        decay = (options.lr_decay_iters or train.train_iters or 0) * global_batch_size
        warmup = options.lr_warmup_iters * global_batch_size
    if options.lr_warmup_fraction is not None:
        warmup = round(options.lr_warmup_fraction * decay)
    if warmup > decay:
        raise ConfigError(
            f"the warm-up of the learning rate, {warmup} samples, "
            f"is longer than its decay, {decay} samples: {_FLAGS['warmup']}"
        )
    return LearningRateSchedule(
        peak=options.lr,
        floor=options.min_lr,
        style=options.lr_decay_style,
        warmup=warmup,
        decay=decay,
    )
