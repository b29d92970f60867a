"""Pretraining from a configuration to trained weights.

1. Take this process's place among the ranks, if what is trained can be saved.
2. Open the data; the model is built for its vocabulary.
3. Continue from a checkpoint, if there is one to continue from.
4. Step by step: train, report, validate, save.
5. Save what is trained and test it.

Batches, random numbers and learning rate are functions of how far the run has come, and everything
else is in the checkpoint. A run that is killed and started again by the same command therefore
ends with the very weights of a run that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from megatron.config import Config
from megatron.data import split_documents
from megatron.data.loader import SampleDataset
from megatron.errors import ConfigError
from megatron.monitor import StepProfiler
from megatron.mpu import ParallelState
from megatron.ops import kernels
from megatron.training import checkpoints
from megatron.training.batches import evaluation_batches, training_batches
from megatron.training.initialize import finalize, initialize, own_rank, world_size
from megatron.training.one_voice import one_voice
from megatron.training.reports import Reporter
from megatron.training.signals import Signals
from megatron.training.stopping import BrokenOffError, Stopping
from megatron.training.task import Batch, Datasets, SampleCounts, Task
from megatron.training.trainer import Step, Trainer
from megatron.validation.places import why_not_writable

Hook = Callable[[Step], None]


def pretrain(config: Config, make_task: Callable[[Config], Task]) -> None:
    """Trains as `config` says, on every rank that torchrun started or on one alone.

    Raises:
        UserError: the configuration, the data or the checkpoint is not fit for it, or --save names
            a place that cannot be written to.
    """
    signals = Signals(with_sigterm=config.train.exit_signal_handler)
    with one_voice(own_rank(), world_size()), signals:
        _check_that_it_can_save(config.train.save)
        task = make_task(config)
        config = with_vocabulary(config, task.vocab_size)
        state = initialize(config)
        _run(config, task, state, signals)
        finalize(state)


def _check_that_it_can_save(directory: str | None) -> None:
    """Raises ConfigError before the first checkpoint, hours later, would fail."""
    reason = None if directory is None else why_not_writable(Path(directory))
    if reason is not None:
        raise ConfigError(f"--save {directory}: {reason}")


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """`config` with the tokenizer's number of tokens, unless a larger one is stated."""
    stated = config.model.vocab_size
    if stated is None:
        return config.with_vocab_size(vocab_size)
    if stated < vocab_size:
        raise ConfigError(f"--vocab-size {stated} is less than the tokenizer's {vocab_size}")
    return config


def sample_counts(config: Config, data_parallel_size: int) -> SampleCounts:
    """The samples that the run takes from each split; none of one whose share in --split is 0."""
    train = config.train
    global_batch = train.global_batch(data_parallel_size)
    trained = train.train_samples
    if trained is None:
        trained = (train.train_iters or 0) * global_batch
    # So many documents that every share above 0 gets some.
    _, validation, test = split_documents(config.data.split, 1 << 40)
    evaluated = train.eval_iters * global_batch
    return SampleCounts(trained, evaluated if validation else 0, evaluated if test else 0)


def _run(config: Config, task: Task, state: ParallelState, signals: Signals) -> None:
    say = print if state.rank == 0 else _say_nothing
    datasets = task.datasets(config, sample_counts(config, state.data.size), say)
    trainer = Trainer(config, task, state)
    resumed = checkpoints.resume(trainer)
    with (
        closing(Reporter(trainer)) as reporter,
        Stopping(config.train, state, signals) as stopping,
    ):
        _greet(trainer, reporter, resumed)
        batches = signals.kept_from_workers(training_batches(trainer, datasets.train))
        _train(trainer, batches, datasets, reporter, stopping)
        if stopping.reason is None:
            _evaluate(trainer, datasets.test, reporter, stopping, "test")
        if stopping.reason is not None and state.rank == 0:
            reporter.say(stopping.say_goodbye(trainer.iteration))
    trainer.finish()


def _train(
    trainer: Trainer,
    batches: Iterator[Batch],
    datasets: Datasets,
    reporter: Reporter,
    stopping: Stopping,
) -> None:
    """Trains to the end of the run, or to where it is stopped, and saves."""
    train = trainer.config.train
    saver = _Saver(trainer, reporter)
    hooks: list[Hook] = [
        reporter,
        every(
            train.eval_interval,
            lambda: _evaluate(trainer, datasets.validation, reporter, stopping, "validation"),
        ),
        every(train.save_interval, saver.save),
    ]
    with _profiling(trainer, reporter) as profiled:
        for step in trainer.steps(batches):
            for hook in (profiled, *hooks):
                hook(step)
            if stopping(step.iteration):
                break
    saver.save()


@contextmanager
def _profiling(trainer: Trainer, reporter: Reporter) -> Iterator[Hook]:
    """Profiles the iterations that --profile-steps names, and says where it is written."""
    train, state = trainer.config.train, trainer.state
    directory = Path(train.profile_dir)
    profiler = StepProfiler(train.profiled_iterations, directory, state.rank, state.device)

    def hook(step: Step) -> None:
        if profiler.end(step.iteration):
            reporter.say(f"profile of iterations {train.profile_steps} in {train.profile_dir}")
        profiler.begin(step.iteration + 1)

    profiler.begin(trainer.iteration + 1)
    try:
        yield hook
    finally:
        profiler.close()


class _Saver:
    """Saves the run where --save says, each state of it once."""

    def __init__(self, trainer: Trainer, reporter: Reporter) -> None:
        self._trainer = trainer
        self._reporter = reporter
        self._directory = trainer.config.train.save
        self._saved = trainer.iteration  # there is nothing new in the state that a run starts from

    def save(self) -> None:
        if self._directory is None or self._saved == self._trainer.iteration:
            return
        with self._reporter.pause():
            checkpoints.save(self._trainer, Path(self._directory))
        self._saved = self._trainer.iteration
        self._reporter.say(f"saved iteration {self._saved} in {self._directory}")


def _say_nothing(line: str) -> None:
    """Takes the lines of all ranks but one."""


def every(interval: int | None, action: Callable[[], None]) -> Hook:
    """A hook that acts at the iterations divisible by `interval`; never where that is None."""

    def hook(step: Step) -> None:
        if interval is not None and step.iteration % interval == 0:
            action()

    return hook


def _evaluate(
    trainer: Trainer,
    dataset: SampleDataset | None,
    reporter: Reporter,
    stopping: Stopping,
    split: str,
) -> None:
    if dataset is None:
        return
    in_a_step = trainer.num_micro_batches(trainer.ramp.full)
    batches = stopping.breaking_off(evaluation_batches(trainer, dataset), in_a_step)
    try:
        with reporter.pause():
            means = trainer.evaluate(batches)
    except BrokenOffError:
        reporter.say(f"the {split} evaluation of iteration {trainer.iteration} is broken off")
    else:
        reporter.evaluation(split, means)


def _greet(trainer: Trainer, reporter: Reporter, resumed: bool) -> None:
    """Says what is about to be trained, on what, and from where."""
    config, topology, ramp = trainer.config, trainer.state.topology, trainer.ramp
    parameters = trainer.optimizer.parameter_count()
    tokens = trainer.task.tokens_per_sample(config)
    reporter.say(
        f"{parameters:,} parameters in {config.model.dtype} on {trainer.state.device.type}, "
        f"{config.model.vocab_size:,} tokens in the vocabulary"
    )
    reporter.say(
        f"{topology.world_size} ranks: tensor {topology.tensor} x pipeline {topology.pipeline} "
        f"x data {topology.data}; {trainer.num_micro_batches(ramp.full)} micro-batches "
        f"of {config.train.micro_batch_size} samples of {tokens} tokens"
    )
    reporter.say(f"between matrix products: {kernels.description(trainer.state.device)}")
    if ramp.start < ramp.full:
        reporter.say(
            f"the global batch grows from {ramp.start} to {ramp.full} samples "
            f"over the first {ramp.ramp:,} of the run"
        )
    if resumed:
        reporter.say(f"continuing after iteration {trainer.iteration} from {config.train.load}")
