"""One rank's part of the model with all that a step of training needs.

A step:

1. count   what each part of the loss is a mean over, in all micro-batches of the global batch
2. run     the micro-batches through the pipeline; gradients add up in flat buffers
3. finish  the sums of the gradients over the data-parallel ranks, begun during the last backward
4. update  the weights

Since the counts are known before the first forward pass, the loss is a mean over the global batch,
however that is cut into micro-batches and spread over ranks. No step makes the host wait for an
accelerator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from megatron.config import Config
from megatron.monitor import Timers
from megatron.mpu import ParallelState, ShardSpec, stages
from megatron.mpu.collectives import all_reduce, broadcast
from megatron.optimizer import build_optimizer, build_schedule
from megatron.pipeline.runtime import PipelineRuntime
from megatron.pipeline.schedule import make_schedule
from megatron.training.task import Batch, Parts, Task


@dataclass(frozen=True)
class Step:
    """What one step did; its tensors are on the device and not yet summed over ranks.

    Attributes:
        iteration: number of the step, from 1.
        samples: samples consumed by the run so far.
        learning_rate: the rate of this step.
        parts: float64 [parts], this rank's share of the loss's parts; zeros before the last stage.
        grad_norm: float64, norm of the whole gradient before clipping.
        skipped: bool, whether the gradient was not finite and the weights were left alone.
    """

    iteration: int
    samples: int
    learning_rate: float
    parts: Tensor
    grad_norm: Tensor
    skipped: Tensor


class Trainer:
    """The state of a run on one rank, and its steps.

    Every rank must make one: the word embedding is equalised over the stages. `iteration` and
    `samples` say how far the run has come.
    """

    def __init__(self, config: Config, task: Task, state: ParallelState) -> None:
        train, parallel = config.train, config.parallel
        self.config, self.task, self.state = config, task, state
        self.global_batch = train.global_batch(state.data.size)
        self.num_micro_batches = train.num_micro_batches(state.data.size)
        self.iteration = self.samples = 0
        self.timers = Timers(state.device)
        every_stage = stages(parallel.stage_layers(config.model.num_layers))
        self.chunks = [task.build_model(config, state, every_stage[state.pipeline.rank])]
        self.optimizer = build_optimizer(config, self.chunks, state)
        self.learning_rates = build_schedule(config, self.global_batch)
        schedule = make_schedule(
            parallel.pipeline_schedule, state.pipeline.size, self.num_micro_batches
        )
        self._runtime = PipelineRuntime(
            self.chunks, schedule, state, self._forward_step, task.activation(config)
        )
        self._totals = self._ones = torch.ones(
            len(task.loss_parts), dtype=torch.float64, device=state.device
        )

    @property
    def weights(self) -> Iterator[tuple[str, Tensor, ShardSpec]]:
        """Every parameter of this rank with the name it is stored under and its split."""
        for chunk in self.chunks:
            for parameter in chunk.parameters():
                spec: ShardSpec = parameter.shard_spec  # type: ignore[attr-defined]
                yield spec.key, parameter, spec

    @property
    def last_iteration(self) -> int:
        """The iteration after which the run is complete."""
        train = self.config.train
        if train.train_samples is not None:
            return train.train_samples // self.global_batch
        return train.train_iters or 0

    def steps(self, batches: Iterator[Batch]) -> Iterator[Step]:
        """Trains until the run is complete, yielding after each step."""
        while self.iteration < self.last_iteration:
            with self.timers.section("batches"):
                taken = [next(batches) for _ in range(self.num_micro_batches)]
            yield self.step(taken)

    def step(self, batches: Sequence[Batch]) -> Step:
        """One step on this rank's micro-batches of the global batch, which are on the host."""
        for chunk in self.chunks:
            chunk.train()
        gradients, section = self.optimizer.gradients, self.timers.section
        with section("forward-backward"):
            self._totals = self._count(batches).clamp(min=1)
            gradients.zero()
            parts = self._runtime.run(
                map(self._to_device, batches),
                on_last_backward=gradients.on_last_backward,
                loss_scale=self.optimizer.loss_scale,
            )
        with section("gradients"):
            gradients.finish()
        with section("optimizer"):
            learning_rate = self.learning_rates.rate(self.samples)
            result = self.optimizer.step(learning_rate)
        self.iteration += 1
        self.samples += self.global_batch
        summed = self._sum(parts)
        return Step(
            self.iteration, self.samples, learning_rate, summed, result.grad_norm, result.skipped
        )

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The mean of each part of the loss over all that the batches hold on all ranks.

        The number of batches is a multiple of the micro-batches of a step, the same on every rank.
        A part of which nothing was counted is NaN. Every rank gets the result.
        """
        for chunk in self.chunks:
            chunk.eval()
        self._totals = self._ones
        sums, counts = torch.zeros_like(self._ones), torch.zeros_like(self._ones)
        waiting = iter(batches)
        while taken := list(islice(waiting, self.num_micro_batches)):
            sums += self._sum(self._runtime.run(map(self._to_device, taken), forward_only=True))
            counts += self._count(taken)
        means = (self.over_ranks(sums) / counts).tolist()
        return dict(zip(self.task.loss_parts, means, strict=True))

    def over_ranks(self, shares: Tensor) -> Tensor:
        """Adds up, in place and for all ranks, what the last stages of all replicas know."""
        all_reduce(shares, self.state.data)
        return broadcast(shares, self.state.pipeline, source=self.state.pipeline.size - 1)

    def _count(self, batches: Sequence[Batch]) -> Tensor:
        """The denominators of the whole global batch, float64 [parts]."""
        counts = torch.stack([self.task.denominators(batch) for batch in batches]).sum(0)
        return all_reduce(counts.to(self.state.device, non_blocking=True), self.state.data)

    def _to_device(self, batch: Batch) -> Batch:
        device = self.state.device
        return {name: field.to(device, non_blocking=True) for name, field in batch.items()}

    def _forward_step(
        self, chunk: nn.Module, batch: Batch, micro_batch: int
    ) -> tuple[Tensor, Parts]:
        self.state.streams.start(self.config.train.seed, self.iteration, micro_batch)
        return self.task.forward_step(chunk, batch, self._totals)

    def _sum(self, parts: Sequence[Parts]) -> Tensor:
        """The parts of this rank's micro-batches, float64 [parts]."""
        if not parts:
            return torch.zeros_like(self._ones)
        rows = [torch.stack([p[name].double() for name in self.task.loss_parts]) for p in parts]
        return torch.stack(rows).sum(0)
