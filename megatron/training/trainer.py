"""One rank's part of the model with all that a step of training needs.

A step:

1. count   what each part of the loss is a mean over, in all micro-batches of the global batch
2. run     the micro-batches through the pipeline; gradients add up in flat buffers
3. finish  the sums of the gradients over the data-parallel ranks, begun during the last backward
4. update  the weights

Since the counts are known before the first forward pass, the loss is a mean over the global batch,
however that is cut into micro-batches and spread over ranks. No step makes the host wait for an
accelerator, but for the first few of a zb-2p that has to be measured (`plan`) or of a run that
records its micro-batches (`graphs`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from megatron.config import Config
from megatron.monitor import Timers
from megatron.mpu import ParallelState, ShardSpec
from megatron.mpu.collectives import all_reduce, broadcast
from megatron.mpu.fp8 import Fp8Scaling
from megatron.optimizer import build_optimizer, build_schedule
from megatron.optimizer.optimizer import StepResult
from megatron.pipeline.runtime import PipelineRuntime
from megatron.training.batch_ramp import BatchRamp
from megatron.training.graphs import (
    MicroBatchGraphs,
    Recorder,
    cuda_recorder,
    leave_default_stream,
)
from megatron.training.plan import Planner
from megatron.training.sending import Sender, Sent
from megatron.training.task import Batch, Parts, Task


@dataclass(frozen=True)
class Step:
    """What one step did; its tensors are on the device and not yet summed over ranks.

    Attributes:
        iteration: number of the step, from 1.
        samples: samples consumed by the run so far.
        batch_size: samples of this step over all ranks.
        learning_rate: the rate of this step.
        parts: float64 [parts], this rank's share of the loss's parts; zeros before the last stage.
        update: what became of the weights.
    """

    iteration: int
    samples: int
    batch_size: int
    learning_rate: float
    parts: Tensor
    update: StepResult

    @property
    def grad_norm(self) -> Tensor:
        """Norm of the whole gradient before clipping, float64; it may have to be waited for."""
        return self.update.grad_norm

    @property
    def skipped(self) -> Tensor:
        """Bool, whether the gradient was not finite and the weights were left alone."""
        return self.update.skipped


class Trainer:
    """The state of a run on one rank, and its steps.

    Every rank must make one: the word embedding is equalised over the stages. `iteration` and
    `samples` say how far the run has come; `runtime` executes the schedule.

    Args:
        record: how --cuda-graphs records a micro-batch; by default as a graph of the GPU.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        state: ParallelState,
        *,
        record: Recorder | None = None,
    ) -> None:
        self.config, self.task, self.state = config, task, state
        if config.train.cuda_graphs and record is None:
            leave_default_stream(state.device)
            record = cuda_recorder(state.device)
        self.ramp = BatchRamp.of(config.train, state.data.size)
        self.iteration = self.samples = 0
        self.timers = Timers(state.device)
        stages = task.stages(config)
        self._plan = Planner(config.parallel, state, len(stages))
        own = self._plan(1).stages_of(state.pipeline.rank)
        self.chunks = [task.build_model(config, state, stages[index]) for index in own]
        self.fp8_scaling = Fp8Scaling(self.chunks, state)
        self.optimizer = build_optimizer(config, self.chunks, state)
        self.learning_rates = build_schedule(config, self.ramp.full)
        self.runtime = PipelineRuntime(
            self.chunks,
            self._plan,
            state,
            self._forward_step,
            lambda index: task.activation(config, state, stages[index]),
        )
        # Written in place: a recorded micro-batch reads them where they are.
        self._totals = torch.ones(len(task.loss_parts), dtype=torch.float64, device=state.device)
        self._sender = Sender(task, state.device)
        self._graphs: MicroBatchGraphs | None = None
        if config.train.cuda_graphs and record is not None:
            common, split = torch.zeros(2, 1, dtype=torch.int64, device=state.device)
            state.streams.static_keys = common, split
            self._graphs = MicroBatchGraphs(self._forward_backward, self._start_streams, record)

    @property
    def weights(self) -> Iterator[tuple[str, Tensor, ShardSpec]]:
        """Every parameter of this rank with the name it is stored under and its split."""
        self.optimizer.finish_gather()
        for chunk in self.chunks:
            for parameter in chunk.parameters():
                spec: ShardSpec = parameter.shard_spec  # type: ignore[attr-defined]
                yield spec.key, parameter, spec

    def num_micro_batches(self, batch_size: int) -> int:
        """The micro-batches of this rank in a step of `batch_size` samples over all ranks."""
        return batch_size // (self.config.train.micro_batch_size * self.state.data.size)

    @property
    def is_complete(self) -> bool:
        """Whether the run has no further step."""
        train = self.config.train
        if train.train_samples is None:
            return self.iteration >= (train.train_iters or 0)
        return self.samples + self.ramp.at(self.samples) > train.train_samples

    @property
    def last_iteration(self) -> int:
        """The iteration after which the run is complete."""
        train = self.config.train
        if train.train_samples is None:
            return train.train_iters or 0
        return self.iteration + self.ramp.steps(self.samples, train.train_samples)

    def steps(self, batches: Iterator[Batch]) -> Iterator[Step]:
        """Trains until the run is complete, yielding after each step."""
        sent: Sent | None = None
        while not self.is_complete:
            step = self._step(sent or self._send_next(batches))
            # An accelerator is still at this step, while what the next one needs sets out for it.
            goes_on = self._sender.runs_ahead and not self.is_complete
            sent = self._send_next(batches) if goes_on else None
            yield step

    def step(self, batches: Sequence[Batch]) -> Step:
        """One step on this rank's micro-batches of the global batch, which are on the host."""
        return self._step(self._sender.send(batches))

    def _send_next(self, batches: Iterator[Batch]) -> Sent:
        with self.timers.section("batches"):
            wanted = self.num_micro_batches(self.ramp.at(self.samples))
            return self._sender.send([next(batches) for _ in range(wanted)])

    def _step(self, sent: Sent) -> Step:
        for chunk in self.chunks:
            chunk.train()
        gradients, section = self.optimizer.gradients, self.timers.section
        with section("forward-backward"), self._plan.observe(self.runtime):
            batches, denominators = sent.take()
            self._totals.copy_(all_reduce(denominators, self.state.data).clamp(min=1))
            gradients.zero()
            with self.fp8_scaling.step():
                parts = self._run(batches)
        with section("gradients"):
            gradients.finish()
        with section("optimizer"):
            learning_rate = self.learning_rates.rate(self.samples)
            update = self.optimizer.step(learning_rate)
            if self.optimizer.hears_all_stages:
                # So all that was sent has arrived: it is let go without waiting.
                self.runtime.finish()
        batch_size = sent.count * self.config.train.micro_batch_size * self.state.data.size
        self.iteration += 1
        self.samples += batch_size
        return Step(
            self.iteration,
            self.samples,
            batch_size,
            learning_rate,
            self._sum(parts),
            update,
        )

    def _run(self, batches: Sequence[Batch]) -> Sequence[Parts]:
        """The parts of the loss of each micro-batch, whose gradients are added up."""
        if self._graphs is None:
            return self.runtime.run(
                batches,
                on_last_backward=self.optimizer.gradients.on_last_backward,
                loss_scale=self.optimizer.loss_scale,
            )
        # A recording can wait for nobody.
        self.optimizer.finish_gather()
        return [self._graphs(batch, index) for index, batch in enumerate(batches)]

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The mean of each part of the loss over all that the batches hold on all ranks.

        The number of batches is a multiple of a whole step's, the same on every rank.
        A part of which nothing was counted is NaN. Every rank gets the result.
        """
        self.optimizer.finish_gather()
        for chunk in self.chunks:
            chunk.eval()
        self._totals.fill_(1)
        sums, counts = torch.zeros_like(self._totals), torch.zeros_like(self._totals)
        waiting = iter(batches)
        while taken := list(islice(waiting, self.num_micro_batches(self.ramp.full))):
            on_device, denominators = self._sender.send(taken).take()
            sums += self._sum(self.runtime.run(on_device, forward_only=True))
            counts += all_reduce(denominators, self.state.data)
        means = (self.over_ranks(sums) / counts).tolist()
        return dict(zip(self.task.loss_parts, means, strict=True))

    def finish(self) -> None:
        """Waits for what is still under way to other ranks, before the process groups are left."""
        self.optimizer.finish_gather()
        self.runtime.finish()

    def over_ranks(self, shares: Tensor) -> Tensor:
        """Adds up, in place and for all ranks, what the last stages of all replicas know."""
        all_reduce(shares, self.state.data)
        return broadcast(shares, self.state.pipeline, source=self.state.pipeline.size - 1)

    def _forward_step(
        self, chunk: nn.Module, batch: Batch, micro_batch: int
    ) -> tuple[Tensor, Parts]:
        place = next(i for i, own in enumerate(self.chunks) if own is chunk)
        self._start_streams(micro_batch, place)
        return self.task.forward_step(chunk, batch, self._totals)

    def _start_streams(self, micro_batch: int, place: int = 0) -> None:
        self.state.streams.start(self.config.train.seed, self.iteration, micro_batch, place)

    def _forward_backward(self, batch: Batch) -> Parts:
        """A micro-batch by itself, where one stage is the whole model."""
        loss, parts = self.task.forward_step(self.chunks[0], batch, self._totals)
        torch.autograd.backward(loss * self.optimizer.loss_scale)
        return parts

    def _sum(self, parts: Sequence[Parts]) -> Tensor:
        """The parts of this rank's micro-batches, float64 [parts]."""
        if not parts:
            return torch.zeros_like(self._totals)
        rows = [torch.stack([p[name].double() for name in self.task.loss_parts]) for p in parts]
        return torch.stack(rows).sum(0)
