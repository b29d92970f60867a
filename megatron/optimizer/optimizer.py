"""The update of the weights, from accumulated gradients to new parameters.

A step, all of it on the device and on whole flat buffers::

    norm     of the gradient over the model, each tensor once, divided by the loss scale
    finite?  a norm that is not marks the step as skipped: no weight, moment or count changes
    update   gradients are divided by loss scale and clipping factor inside the fused optimizer
    round    half-precision parameters are copied from their float32 masters
    scale    the loss scaler hears whether the step was skipped

Nothing waits for the device: the caller reads the result when it wants to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config import Config, OptimizerConfig
from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.shard_spec import ShardSpec
from megatron.optimizer.flat_buffer import FlatBuffer, shard_spec
from megatron.optimizer.grad_norm import global_norm, parameter_count
from megatron.optimizer.gradients import GradientBuffers
from megatron.optimizer.loss_scaler import LossScaler, build_loss_scaler

# Keeps the clipping factor finite for a gradient of zeros, as torch.nn.utils.clip_grad_norm_ does.
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class StepResult:
    """What a step did; scalars on the device.

    Attributes:
        grad_norm: float64, norm of the whole gradient before clipping, loss scale divided out.
        skipped: bool, whether the gradient was not finite and nothing was updated.
    """

    grad_norm: Tensor
    skipped: Tensor


@dataclass(frozen=True)
class _Stepped:
    """A flat buffer and the tensor that the optimizer updates for it.

    ``weights`` shares the buffer's memory in float32 and float64 and is a float32 master of it in
    half precision.
    """

    buffer: FlatBuffer
    weights: nn.Parameter

    @classmethod
    def of(cls, buffer: FlatBuffer) -> _Stepped:
        weights = nn.Parameter(buffer.values.to(buffer.gradients.dtype))
        weights.grad = buffer.gradients
        return cls(buffer, weights)

    @property
    def has_master(self) -> bool:
        return not self.buffer.accumulates_in_place


class Optimizer:
    """AdamW or SGD over the flat buffers of this rank's chunks.

    All optimizer state is allocated here and never replaced, so that a checkpoint can be loaded
    into :meth:`state_tensors` in place.
    """

    def __init__(
        self,
        options: OptimizerConfig,
        gradients: GradientBuffers,
        scaler: LossScaler,
        state: ParallelState,
    ) -> None:
        self.gradients = gradients
        self._state = state
        self._clip = options.clip_grad
        self._scaler = scaler
        self._stepped = [_Stepped.of(buffer) for buffer in gradients.buffers]
        build = _build_adam if options.optimizer == "adam" else _build_sgd
        self._fused = build(options, self._stepped)
        # The fused kernels take their divisor in float32, too coarse for float64.
        self._exact = any(s.weights.dtype == torch.float64 for s in self._stepped)

    @property
    def loss_scale(self) -> Tensor:
        """The factor to multiply the loss by, a float32 scalar on the device."""
        return self._scaler.scale

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        """Update the parameters from finished gradients, which are used up by it.

        ``lr`` is the learning rate of this step. A collective over ``state.model``.
        """
        counted = (b.gradients for b in self.gradients.buffers if b.counted)
        norm = global_norm(counted, self._state.model, self._state.device) / self.loss_scale
        skipped = ~norm.isfinite()
        self._divide_gradients(norm)
        self._fused.found_inf = skipped.float()  # type: ignore[attr-defined]
        for group in self._fused.param_groups:
            group["lr"] = lr
        self._fused.step()
        for stepped in self._stepped:
            if stepped.has_master:
                stepped.buffer.values.copy_(stepped.weights)
        self._scaler.update(skipped)
        return StepResult(norm, skipped)

    def parameter_norm(self) -> Tensor:
        """Norm of the whole model's parameters, float64; a collective over ``state.model``."""
        counted = (s.weights.detach() for s in self._stepped if s.buffer.counted)
        return global_norm(counted, self._state.model, self._state.device)

    def parameter_count(self) -> int:
        """Elements of the whole model, without padding and copies; a collective over it."""
        parameters = (p for buffer in self.gradients.buffers for p in buffer.parameters)
        return parameter_count(parameters, self._state)

    @torch.no_grad()
    def reload_masters(self) -> None:
        """Take the masters from the parameters, after these were loaded without optimizer state."""
        for stepped in self._stepped:
            if stepped.has_master:
                stepped.weights.copy_(stepped.buffer.values)

    def state_tensors(self) -> Iterator[tuple[str, Tensor, ShardSpec]]:
        """Every state tensor as (key, view of the parameter's local shape, its spec).

        Keys are ``optimizer.{exp_avg,exp_avg_sq,momentum_buffer,master}.{name}``. Writing into the
        views restores the state. A tied copy comes under its owner's key.
        """
        for stepped in self._stepped:
            for kind, flat in self._flat_state(stepped):
                views = stepped.buffer.views(flat)
                for view, parameter in zip(views, stepped.buffer.parameters, strict=True):
                    spec = shard_spec(parameter)
                    yield f"optimizer.{kind}.{spec.key}", view, spec

    def state_dict(self) -> dict[str, Any]:
        """The scalar state as plain numbers: steps taken and the loss scaler's."""
        steps = self._step_counts()
        return {
            "steps": int(steps[0].item()) if steps else 0,
            "loss_scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`'s numbers."""
        for count in self._step_counts():
            count.fill_(state["steps"])
        self._scaler.load_state_dict(state["loss_scaler"])

    def _divide_gradients(self, norm: Tensor) -> None:
        """Divide by the loss scale and, where the norm is too large, down to the clipping norm."""
        divisor = self.loss_scale.double()
        if self._clip > 0:
            divisor = divisor * ((norm + NORM_EPSILON) / self._clip).clamp(min=1)
        if not self._exact:
            self._fused.grad_scale = divisor.float()  # type: ignore[attr-defined]
            return
        for buffer in self.gradients.buffers:
            buffer.gradients.div_(divisor)

    def _flat_state(self, stepped: _Stepped) -> Iterator[tuple[str, Tensor]]:
        for kind, flat in self._fused.state[stepped.weights].items():
            if kind != "step":
                yield kind, flat
        if stepped.has_master:
            yield "master", stepped.weights.detach()

    def _step_counts(self) -> list[Tensor]:
        states = (self._fused.state[stepped.weights] for stepped in self._stepped)
        return [state["step"] for state in states if "step" in state]


def build_optimizer(config: Config, chunks: Sequence[nn.Module], state: ParallelState) -> Optimizer:
    """Move the chunks' parameters into flat buffers and build what updates them.

    Every rank must call it, after the weights are on their device.
    """
    gradients = GradientBuffers(chunks, state, config.parallel.gradient_bucket_size)
    scaler = build_loss_scaler(config, state.device)
    return Optimizer(config.optimizer, gradients, scaler, state)


def _build_adam(options: OptimizerConfig, stepped: Sequence[_Stepped]) -> torch.optim.Optimizer:
    adam = torch.optim.AdamW(
        _parameter_groups(options, stepped),
        lr=options.lr,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        fused=True,
    )
    for each in stepped:
        adam.state[each.weights] = {
            "step": torch.zeros((), dtype=torch.float32, device=each.weights.device),
            "exp_avg": torch.zeros_like(each.weights, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(each.weights, requires_grad=False),
        }
    return adam


def _build_sgd(options: OptimizerConfig, stepped: Sequence[_Stepped]) -> torch.optim.Optimizer:
    sgd = torch.optim.SGD(
        _parameter_groups(options, stepped),
        lr=options.lr,
        momentum=options.sgd_momentum,
        fused=True,
    )
    if options.sgd_momentum > 0:
        # A buffer that torch makes by itself in a skipped first step is left uninitialised.
        for each in stepped:
            zeros = torch.zeros_like(each.weights, requires_grad=False)
            sgd.state[each.weights] = {"momentum_buffer": zeros}
    return sgd


def _parameter_groups(
    options: OptimizerConfig, stepped: Sequence[_Stepped]
) -> list[dict[str, Any]]:
    return [
        {
            "params": [each.weights],
            "weight_decay": options.weight_decay if each.buffer.traits.decayed else 0.0,
        }
        for each in stepped
    ]
