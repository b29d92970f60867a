"""Fine-tuning on tensor, pipeline and data parallel ranks.

    tuner = FineTuner(model, lr=5e-5, total_steps=1000, warmup_steps=100)
    for batches in loader:                    # this data rank's micro-batches of a step
        step = tuner.step(batches)            # dicts of forward's arguments, labels among them
        print(step.loss, step.grad_norm, step.learning_rate)
    model.save_pretrained(directory)

A step counts the labels of all its micro-batches on all ranks, runs the micro-batches through the
pipeline, and updates the weights. Since the counts are known first, the loss is a mean over the
whole step, however that is cut into micro-batches and spread over ranks. Between two steps the
model is whole: it may be run, looked at and saved.

Weight decay leaves biases and norms alone. Parameters with `requires_grad=False` stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.save_load import NamedTensor, load_checkpoint, save_checkpoint
from megatron.config import Config, OptimizerConfig, ParallelConfig, TrainConfig
from megatron.config.flags import flags_of
from megatron.errors import ConfigError, DataError
from megatron.hf.fine_tuning_losses import LABELS, Batch, Term, loss_terms, sequence_shape
from megatron.hf.heads import HeadedModel
from megatron.hf.outputs import ModelOutput
from megatron.mpu.collectives import all_reduce, broadcast
from megatron.optimizer import LearningRateSchedule, StepResult, build_optimizer
from megatron.pipeline.p2p import TensorSpec
from megatron.pipeline.runtime import Parts, PipelineRuntime
from megatron.pipeline.schedule import make_schedule


@dataclass(frozen=True)
class FineTuningStep:
    """What one step did, the same on all ranks; its tensors are scalars on the device.

    Attributes:
        number: of the step, from 1.
        loss: mean over the labels of the whole step.
        learning_rate: of this step.
    """

    number: int
    loss: Tensor
    learning_rate: float
    _update: StepResult

    @property
    def grad_norm(self) -> Tensor:
        """Norm of the whole gradient before clipping."""
        return self._update.grad_norm

    @property
    def skipped(self) -> Tensor:
        """Bool, whether the gradient was not finite and the weights were left alone."""
        return self._update.skipped


@dataclass(frozen=True)
class _MicroBatch:
    inputs: Batch
    terms: Sequence[Term]
    totals: Tensor  # float64 [terms], the labels of the whole step


class FineTuner:
    """Trains a model with a head by AdamW, in micro-batches; every rank makes one.

    Args:
        model: as `from_pretrained` returns it; its parameters move into flat buffers.
        lr: largest learning rate, reached after `warmup_steps`.
        lr_decay_style: "linear" or "cosine" down to `min_lr` after `total_steps`, warm-up
            included, or "constant".
        clip_grad: largest norm of the whole gradient; 0 does not clip.
        use_distributed_optimizer: spread the optimizer's state over the data-parallel ranks.
        micro_batch_size: what `step` is given is cut into micro-batches of so many samples;
            by default each batch is one.
        pipeline_schedule: "1f1b", "gpipe", "zb-h1" or "zb-2p".
        seed: of dropout.

    Attributes:
        steps: taken so far.

    Raises:
        ConfigError: a value is impossible, or the model has no head; a line for each problem.
    """

    def __init__(
        self,
        model: HeadedModel,
        *,
        lr: float,
        min_lr: float = 0.0,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        lr_decay_style: str = "linear",
        weight_decay: float = 0.01,
        clip_grad: float = 1.0,
        adam_beta1: float = 0.9,
        adam_beta2: float = 0.999,
        adam_eps: float = 1e-8,
        use_distributed_optimizer: bool = False,
        micro_batch_size: int | None = None,
        pipeline_schedule: str = "1f1b",
        seed: int = 1234,
    ) -> None:
        if not isinstance(model, HeadedModel):
            raise ConfigError(f"{type(model).__name__} has no head, and so no loss to train by")
        self.model = model
        self.state = model.state
        options = OptimizerConfig(
            lr=lr,
            min_lr=min_lr,
            lr_decay_style=lr_decay_style,
            lr_decay_iters=total_steps,
            lr_warmup_iters=warmup_steps,
            weight_decay=weight_decay,
            clip_grad=clip_grad,
            adam_beta1=adam_beta1,
            adam_beta2=adam_beta2,
            adam_eps=adam_eps,
        )
        parallel = replace(
            model.native_config.parallel,
            use_distributed_optimizer=use_distributed_optimizer,
            pipeline_schedule=pipeline_schedule,
        )
        train = replace(
            model.native_config.train,
            micro_batch_size=1 if micro_batch_size is None else micro_batch_size,
            seed=seed,
            # Dropout's streams are started anew for every micro-batch.
            no_save_rng=True,
            no_load_rng=True,
        )
        self.config = _checked(model, options, parallel, train)
        self.learning_rates = LearningRateSchedule(
            lr, min_lr, lr_decay_style, warmup_steps, total_steps or warmup_steps
        )
        self.steps = 0
        model.bert.agree_on_frozen()
        self.optimizer = build_optimizer(self.config, [model], self.state)
        self._micro_batch_size = micro_batch_size
        self._activation = TensorSpec((0, 0, 0), model.dtype)
        self._runtime = PipelineRuntime(
            [model.bert.language_model],
            partial(make_schedule, pipeline_schedule, self.state.pipeline.size),
            self.state,
            self._forward_step,
            lambda stage: self._activation,
        )

    def step(self, batches: Sequence[Batch]) -> FineTuningStep:
        """One update of the weights by this data rank's micro-batches.

        Args:
            batches: arguments of the model's `forward`, with labels. All ranks that share a model
                give the same; all batches of a step have the same number of samples and tokens.

        Raises:
            DataError: there is none, their shapes differ, or labels are missing.
        """
        batches = self._micro_batches(batches)
        self._activation = self._announce(batches)
        work = self._counted([self._to_device(batch) for batch in batches])
        self.model.train()
        gradients = self.optimizer.gradients
        gradients.zero()
        with self._own_generators():
            parts = self._runtime.run(
                work,
                on_last_backward=gradients.on_last_backward,
                loss_scale=self.optimizer.loss_scale,
            )
        gradients.finish()
        learning_rate = self.learning_rates.rate(self.steps)
        update = self.optimizer.step(learning_rate)
        # So that the model may be used and saved without a thought of what is still under way.
        self.optimizer.finish_gather()
        self._runtime.finish()
        self.steps += 1
        return FineTuningStep(self.steps, self._over_ranks(parts), learning_rate, update)

    def evaluate(self, batches: Iterable[Batch]) -> Iterator[ModelOutput]:
        """The model's outputs for this data rank's batches, of any shapes, without dropout.

        All ranks that share a model give the same batches and get the same whole outputs; their
        loss is the mean over their own labels.
        """
        for batch in batches:
            self.model.eval()
            with torch.no_grad():
                output = self.model(**self._to_device(batch), return_dict=True)
            yield output

    def save(self, directory: str | Path) -> None:
        """Make the weights and the optimizer's state the latest checkpoint in a directory.

        It is of the project's own format; `resume` continues from it on any layout.

        Raises:
            CheckpointError: it could not be written.
        """
        save_checkpoint(
            Path(directory),
            self.steps,
            self._tensors(),
            {"steps": self.steps, "optimizer": self.optimizer.state_dict()},
            config=self.config,
            state=self.state,
        )

    def resume(self, directory: str | Path) -> None:
        """Continue from the latest checkpoint that `save` has left in a directory.

        Raises:
            CheckpointError: it is missing, damaged, or of another model.
        """
        run_state = load_checkpoint(
            Path(directory), self._tensors(), config=self.config, state=self.state
        )
        self.optimizer.load_state_dict(run_state["optimizer"])
        self.steps = run_state["steps"]

    # --- one micro-batch -------------------------------------------------------------------------

    def _forward_step(
        self, chunk: Any, work: _MicroBatch, micro_batch: int
    ) -> tuple[Tensor, Parts]:
        """This stage's part of a micro-batch: the stream, or the share of the step's loss."""
        self.state.streams.start(self.config.train.seed, self.steps, micro_batch)
        with self.model.bert.stage_alone():
            output = self.model(**work.inputs)
        if not self.model.stage.is_last:
            return output, {}
        shares = [
            term.share(output, total) for term, total in zip(work.terms, work.totals, strict=True)
        ]
        loss = torch.stack(shares).sum()
        return loss, {"loss": loss.detach()}

    def _to_device(self, batch: Batch) -> dict[str, Tensor]:
        device = self.state.device
        return {name: field.to(device, non_blocking=True) for name, field in batch.items()}

    # --- all micro-batches -----------------------------------------------------------------------

    def _micro_batches(self, batches: Sequence[Batch]) -> list[Batch]:
        if self._micro_batch_size is not None:
            size = self._micro_batch_size
            batches = [part for batch in batches for part in _cut(batch, size)]
        if not batches:
            raise DataError("a step was given no batch, expected at least one")
        return list(batches)

    def _announce(self, batches: Sequence[Batch]) -> TensorSpec:
        """What a stage sends to the next one: [s, b, h], the same for all micro-batches."""
        shapes = [sequence_shape(batch) for batch in batches]
        for number, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise DataError(
                    f"micro-batch {number} of a step has {shape[0]} x {shape[1]} tokens and "
                    f"micro-batch 0 has {shapes[0][0]} x {shapes[0][1]}, expected one shape for all"
                )
        b, s = shapes[0]
        return TensorSpec((s, b, self.model.config.hidden_size), self.model.dtype)

    def _counted(self, batches: Sequence[Batch]) -> list[_MicroBatch]:
        """The micro-batches with the labels of the whole step counted."""
        terms = [loss_terms(self.model, batch) for batch in batches]
        counts = torch.stack([torch.stack([term.count for term in each]) for each in terms])
        totals = all_reduce(counts.sum(0).double(), self.state.data).clamp(min=1)
        inputs = (
            {name: field for name, field in batch.items() if name not in LABELS}
            for batch in batches
        )
        return [_MicroBatch(*each, totals) for each in zip(inputs, terms, strict=True)]

    @contextmanager
    def _own_generators(self) -> Iterator[None]:
        """Within it dropout's streams are those of the step; the user's generator stays."""
        device = self.state.device
        on_device = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(on_device, device_type=device.type):
            yield

    def _over_ranks(self, parts: Sequence[Parts]) -> Tensor:
        """The sum of what the last stages of all replicas know, for all ranks."""
        axis = self.state.pipeline
        loss = torch.zeros((), dtype=torch.float64, device=self.state.device)
        for part in parts:
            loss += part["loss"]
        return broadcast(all_reduce(loss, self.state.data), axis, axis.size - 1)

    def _tensors(self) -> Iterator[NamedTensor]:
        weights = (
            (parameter.shard_spec.key, parameter, parameter.shard_spec)  # type: ignore[attr-defined]
            for parameter in self.model.parameters()
        )
        return chain(weights, self.optimizer.state_tensors())


def _checked(
    model: HeadedModel, options: OptimizerConfig, parallel: ParallelConfig, train: TrainConfig
) -> Config:
    """The configuration of the run; raises ConfigError with all that is wrong with it."""
    problems = [*_out_of_bounds(options), *_out_of_bounds(parallel), *_out_of_bounds(train)]
    total, warmup = options.lr_decay_iters, options.lr_warmup_iters
    if total is None and options.lr_decay_style != "constant":
        problems.append(f"lr_decay_style {options.lr_decay_style} needs total_steps, found None")
    if total is not None and warmup > total:
        problems.append(f"warmup_steps {warmup} is more than total_steps {total}")
    if parallel.pipeline_schedule == "interleaved":
        problems.append("pipeline_schedule interleaved: each rank of the family has one stage")
    if problems:
        raise ConfigError(problems)
    native = model.native_config
    network = replace(
        native.model,
        fp16=model.dtype == torch.float16,
        bf16=model.dtype == torch.bfloat16,
        fp64=model.dtype == torch.float64,
    )
    return replace(native, model=network, optimizer=options, parallel=parallel, train=train)


def _out_of_bounds(section: Any) -> Iterator[str]:
    """What is wrong with the fields of a section, by their names."""
    kind: type = type(section)
    for flag in flags_of(kind):
        for problem in flag.problems(getattr(section, flag.name)):
            yield problem.removeprefix("--").replace("-", "_", flag.name.count("_"))


def _cut(batch: Batch, size: int) -> Iterator[Batch]:
    """Micro-batches of `size` samples each; what does not belong to samples goes to all."""
    samples = len(batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"])
    if samples % size:
        raise DataError(f"a batch has {samples} samples, no multiple of micro_batch_size {size}")
    for start in range(0, samples, size):
        yield {
            name: field[start : start + size] if _is_of_samples(name, field, samples) else field
            for name, field in batch.items()
        }


def _is_of_samples(name: str, field: Tensor, samples: int) -> bool:
    """Whether a field has a row for each sample; positions may have one for all."""
    return name != "head_mask" and field.size(0) == samples
