"""What the run says while it trains: means over intervals, gathered from all ranks, on rank 0.

Sums stay on the device from step to step. Only when an interval ends are they added up over the
ranks and read, and only then does the host wait for the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron.monitor import (
    Console,
    MetricsFile,
    Record,
    TensorBoardWriter,
    across_ranks,
    console_line,
    open_console,
)
from megatron.mpu.collectives import MAX, all_reduce
from megatron.training.trainer import Step, Trainer


class Sink(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None:
        """Takes one record."""

    def close(self) -> None:
        """Takes no more."""


@dataclass
class _ConsoleLines:
    """Shows each record as a line."""

    console: Console
    last_iteration: int

    def write(self, record: Record) -> None:
        self.console.print(console_line(record, self.last_iteration))

    def close(self) -> None:
        self.console.close()


class _Window:
    """The steps since the last report to some sinks, one report every `interval` steps."""

    def __init__(self, trainer: Trainer, interval: int, sinks: Sequence[Sink]) -> None:
        self._trainer = trainer
        self.interval = interval
        self.sinks = sinks
        self._parts = torch.zeros(
            len(trainer.task.loss_parts), dtype=torch.float64, device=trainer.state.device
        )
        self._skipped = torch.zeros((), dtype=torch.float64, device=trainer.state.device)
        self._steps = self._samples = 0
        self._start = time.perf_counter()

    def add(self, step: Step) -> None:
        """Counts one step; the losses of a skipped step are not finite and are left out."""
        self._parts += torch.where(step.skipped, 0, step.parts)
        self._skipped += step.skipped
        self._steps += 1
        self._samples += step.batch_size

    def leave_out(self, seconds: float) -> None:
        """Counts these seconds not as training."""
        self._start += seconds

    def read(self, step: Step) -> Record:
        """The record of the window, which starts anew; every rank must call it."""
        trainer = self._trainer
        parts = trainer.over_ranks(self._parts).tolist()
        skipped = int(self._skipped.item())
        trained = max(self._steps - skipped, 1)
        means = [part / trained if skipped < self._steps else float("nan") for part in parts]
        seconds = time.perf_counter() - self._start
        speed, task = self._samples / seconds, trainer.task
        record: dict[str, float | int | None] = {
            "iteration": step.iteration,
            "loss": sum(means),
            **dict(zip(trainer.task.loss_parts, means, strict=True)),
            "grad_norm": step.grad_norm.item(),
            "learning_rate": step.learning_rate,
            "loss_scale": trainer.optimizer.loss_scale.item(),
            "tokens_per_second": speed * task.tokens_per_sample(trainer.config),
            "model_tflops_per_second": speed * task.flops_per_sample(trainer.config) / 1e12,
            "iteration_seconds": seconds / self._steps,
            "skipped": skipped,
            "batch_size": step.batch_size,
            "consumed_samples": step.samples,
        }
        if trainer.config.train.log_params_norm:
            record["params_norm"] = trainer.optimizer.parameter_norm().item()
        self._parts.zero_()
        self._skipped.zero_()
        self._steps = self._samples = 0
        self._start = time.perf_counter()
        return record


class Reporter:
    """Reports a run's steps and evaluations; every rank calls it, rank 0 has the sinks.

    Raises ConfigError where a file that the flags name cannot be written to.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        train = trainer.config.train
        self._console: Console | None = None
        lines: list[Sink] = []
        curves: list[Sink] = []
        if trainer.state.rank == 0:
            if train.metrics_file is not None:
                lines.append(MetricsFile(Path(train.metrics_file), trainer.iteration))
            if train.tensorboard_dir is not None:
                directory, queue = Path(train.tensorboard_dir), train.tensorboard_queue_size
                curves.append(TensorBoardWriter(directory, queue, trainer.iteration))
            self._console = open_console(trainer.last_iteration, trainer.iteration)
            lines.append(_ConsoleLines(self._console, trainer.last_iteration))
        self._lines = _Window(trainer, train.log_interval, lines)
        self._windows = [self._lines]
        if train.tensorboard_dir is not None:
            self._windows.append(_Window(trainer, train.tensorboard_log_interval, curves))

    def __call__(self, step: Step) -> None:
        """Takes note of a step and reports the intervals that it ends."""
        for window in self._windows:
            window.add(step)
            if step.iteration % window.interval == 0:
                record = window.read(step)
                for sink in window.sinks:
                    sink.write(record)
                if window is self._lines:
                    self._say_where_time_went()
        if self._console is not None:
            self._console.advance(step.iteration)

    def evaluation(self, split: str, means: dict[str, float]) -> None:
        """Reports the means of one evaluation, under the split's name: "validation_lm_loss".

        The perplexity of the predicted tokens goes with them.
        """
        record: dict[str, float | int | None] = {"iteration": self._trainer.iteration}
        record[f"{split}_loss"] = sum(means.values())
        record |= {f"{split}_{name}": mean for name, mean in means.items()}
        if "lm_loss" in means:
            # More than e^709 no float64 can hold.
            record[f"{split}_perplexity"] = math.exp(min(means["lm_loss"], 700.0))
        for window in self._windows:
            for sink in window.sinks:
                sink.write(record)

    def say(self, line: str) -> None:
        """Shows a line on rank 0's console."""
        if self._console is not None:
            self._console.print(line)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Keeps the time of the `with` block out of the training speed."""
        self._wait_for_device()
        start = time.perf_counter()
        yield
        self._wait_for_device()
        for window in self._windows:
            window.leave_out(time.perf_counter() - start)

    def close(self) -> None:
        """Closes files and console."""
        for window in self._windows:
            for sink in window.sinks:
                sink.close()

    def _wait_for_device(self) -> None:
        if self._trainer.state.device.type != "cpu":
            torch.accelerator.synchronize()

    def _say_where_time_went(self) -> None:
        state = self._trainer.state

        def over_all_ranks(values: torch.Tensor) -> torch.Tensor:
            values = values.to(state.device)
            return all_reduce(all_reduce(values, state.model, MAX), state.data, MAX)

        spread = across_ranks(self._trainer.timers.read(), over_all_ranks)
        steps = self._lines.interval
        sections = (
            f"{name} {low / steps * 1000:.1f}-{high / steps * 1000:.1f}"
            for name, (low, high) in spread.items()
        )
        self.say("    ms on the fastest-slowest rank: " + ", ".join(sections))
