"""The update of the weights, from accumulated gradients to new parameters.

A step, all of it on the device and on whole flat tensors::

    norm     of the gradient over the model, each tensor once, divided by the loss scale
    finite?  a norm that is not marks the step as skipped: no weight, moment or count changes
    update   gradients are divided by loss scale and clipping factor inside the fused rule
    round    half-precision parameters are made from their float32 masters, by the kernel in passing
    gather   with the distributed optimizer: the other ranks' shards, beside the next forward
    scale    the loss scaler hears whether the step was skipped

Nothing waits for the device: the caller reads the result when it wants to.

Without clipping and loss scaling the update needs no norm, and a stage that is done does not wait
for the others, as zero-bubble schedules want it (arXiv 2401.10241, section 4). The norm is then
summed on the side. Whether a gradient that is not finite skips the step is agreed upon by the ranks
that hold the same tensors, and stages that share nothing decide by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config import Config, OptimizerConfig
from megatron.mpu.collectives import MAX, all_reduce, start_all_reduce
from megatron.mpu.direct import Pending
from megatron.mpu.parallel_state import Axis, ParallelState
from megatron.mpu.shard_spec import ShardSpec
from megatron.optimizer.flat_buffer import shard_spec
from megatron.optimizer.gather import ParameterGather
from megatron.optimizer.grad_norm import global_norm, parameter_count, sum_of_squares
from megatron.optimizer.gradients import GradientBuffers
from megatron.optimizer.loss_scaler import LossScaler, build_loss_scaler
from megatron.optimizer.update import Stepped, build_update

# Keeps the clipping factor finite for a gradient of zeros, as torch.nn.utils.clip_grad_norm_ does.
NORM_EPSILON = 1e-6

# (key, [n], spec, index of the first of the n in this tensor rank's flattened part of the tensor)
StatePart = tuple[str, Tensor, ShardSpec, int]


@dataclass(frozen=True)
class StepResult:
    """What a step did; scalars on the device.

    Attributes:
        skipped: bool, whether the gradient was not finite and nothing was updated; on this stage,
            where stages decide by themselves.
    """

    skipped: Tensor
    _norm: Callable[[], Tensor]

    @property
    def grad_norm(self) -> Tensor:
        """Float64, norm of the whole gradient before clipping, loss scale divided out.

        Waits for the other stages where the step has not.
        """
        return self._norm()


class Optimizer:
    """AdamW or SGD over this rank's shards of its chunks' flat buffers.

    All optimizer state is allocated here and never replaced, so that a checkpoint can be loaded
    into :meth:`state_tensors` in place. With the distributed optimizer ``gather`` brings the other
    ranks' shards; without it every rank's shards are its whole buffers.
    """

    def __init__(
        self,
        options: OptimizerConfig,
        gradients: GradientBuffers,
        scaler: LossScaler,
        state: ParallelState,
        gather: ParameterGather | None = None,
    ) -> None:
        self.gradients = gradients
        self._state = state
        self._clip = options.clip_grad
        self._scaler = scaler
        self._gather = gather
        self._stepped = [Stepped.of(shard) for shard in gradients.shards]
        self._update = build_update(options, self._stepped)
        # The ranks that together hold each element of the model once or, tied, a few times.
        self._whole = state.model if gather is None else _world(state)
        self._agreeing = _agreeing(gradients.shared, state, sharded=gather is not None)
        self._norm_under_way: Pending | None = None

    @property
    def loss_scale(self) -> Tensor:
        """The factor to multiply the loss by, a float32 scalar on the device."""
        return self._scaler.scale

    @property
    def hears_all_stages(self) -> bool:
        """Whether a step ends only once all stages have computed their gradients."""
        return self._clip > 0 or not self._scaler.neutral

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        """Update the parameters from finished gradients, which are used up by it.

        ``lr`` is the learning rate of this step. A collective over all stages, unless there is
        neither clipping nor loss scaling.
        """
        self.finish_gather()
        counted = (s.shard.gradients for s in self._stepped if s.shard.buffer.counted)
        squares = sum_of_squares(counted, self._state.device)
        divisor = None
        if self.hears_all_stages:
            result, divisor = self._decide_together(squares)
        else:
            result = self._decide_by_stage(squares)
        self._update.step(lr, result.skipped, divisor)
        if self._gather is not None:
            self._gather.start()
        self._scaler.update(result.skipped)
        return result

    def finish_gather(self) -> None:
        """Wait for the parameters that other ranks have updated.

        Forward passes wait by themselves; whoever reads parameters otherwise calls it first.
        """
        if self._gather is not None:
            self._gather.finish()

    def parameter_norm(self) -> Tensor:
        """Norm of the whole model's parameters, float64; a collective over the model."""
        counted = (s.weights.detach() for s in self._stepped if s.shard.buffer.counted)
        return global_norm(counted, self._whole, self._state.device)

    def parameter_count(self) -> int:
        """Elements of the whole model, without padding and copies; a collective over it."""
        parameters = (p for buffer in self.gradients.buffers for p in buffer.parameters)
        return parameter_count(parameters, self._state)

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Take the masters from the parameters, after these were loaded without optimizer state."""
        for stepped in self._stepped:
            if stepped.has_master:
                stepped.weights.copy_(stepped.shard.values)

    def state_tensors(self) -> Iterator[StatePart]:
        """What this rank holds of every state tensor, as (key, [n], spec, first).

        Keys are ``optimizer.{exp_avg,exp_avg_sq,momentum_buffer,master}.{name}``. The n elements
        are those from ``first`` on of this tensor rank's flattened part: all of them without the
        distributed optimizer, and possibly none with it. Writing into them restores the state. A
        tied copy comes under its owner's key.
        """
        for stepped in self._stepped:
            for kind, flat in self._flat_state(stepped):
                for parameter, part, first in stepped.shard.parts(flat):
                    spec = shard_spec(parameter)
                    yield f"optimizer.{kind}.{spec.key}", part, spec, first

    def state_dict(self) -> dict[str, Any]:
        """The scalar state as plain numbers: steps taken and the loss scaler's."""
        return {"steps": self._update.steps(), "loss_scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`'s numbers."""
        self._update.resume(state["steps"])
        self._scaler.load_state_dict(state["loss_scaler"])

    def _decide_together(self, squares: Tensor) -> tuple[StepResult, Tensor]:
        """Clip by the norm of the whole model, and skip the step everywhere or nowhere.

        Also returns what to divide the gradients by: the loss scale and, where the norm is too
        large, what brings it down to the clipping norm.
        """
        norm = all_reduce(squares, self._whole).sqrt() / self.loss_scale
        divisor = self.loss_scale.double()
        if self._clip > 0:
            divisor = divisor * ((norm + NORM_EPSILON) / self._clip).clamp(min=1)
        return StepResult(~norm.isfinite(), lambda: norm), divisor

    def _decide_by_stage(self, squares: Tensor) -> StepResult:
        """Skip the step where the holders of a tensor find it bad; the norm is for the report."""
        bad = (~squares.isfinite()).float()
        for axis in self._agreeing:
            all_reduce(bad, axis, MAX)
        if self._norm_under_way is not None:
            self._norm_under_way.wait()
        self._norm_under_way = total = start_all_reduce(squares, self._whole)
        return StepResult(bad > 0, lambda: total.wait().sqrt())

    def _flat_state(self, stepped: Stepped) -> Iterator[tuple[str, Tensor]]:
        yield from self._update.state(stepped.weights).items()
        if stepped.has_master:
            yield "master", stepped.weights.detach()


def build_optimizer(config: Config, chunks: Sequence[nn.Module], state: ParallelState) -> Optimizer:
    """Move the chunks' parameters into flat buffers and build what updates them.

    Every rank must call it, after the weights are on their device.
    """
    parallel = config.parallel
    distributed = parallel.use_distributed_optimizer
    gradients = GradientBuffers(
        chunks,
        state,
        parallel.gradient_bucket_size,
        scattered=distributed,
        streamed=parallel.shard_gradients,
    )
    gather = ParameterGather(chunks, gradients.buckets, state.data) if distributed else None
    scaler = build_loss_scaler(config, state.device)
    return Optimizer(config.optimizer, gradients, scaler, state, gather)


def _world(state: ParallelState) -> Axis:
    """All ranks of the run."""
    ranks = tuple(range(state.world_size))
    return Axis(ranks, state.rank, dist.group.WORLD if len(ranks) > 1 else None)


def _agreeing(shared: Mapping[str, Axis], state: ParallelState, *, sharded: bool) -> list[Axis]:
    """The axes over which ranks hold the same tensors, or shards of the same tensor.

    Of the groups that share tensors with other stages the first is the largest, and the others'
    members are among its own.
    """
    return [state.tensor, *([state.data] if sharded else []), *list(shared.values())[:1]]
