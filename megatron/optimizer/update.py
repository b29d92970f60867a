"""What turns a step's gradients into new weights.

    TorchUpdate   torch's fused AdamW or SGD, then a copy of the masters to the parameters
    KernelAdamW   this project's kernel, all of it in one pass over the shards
    ApexAdam      apex' FusedAdam, to compare

All work on whole shards of the flat buffers and hold the same state under the same names, so that
a checkpoint of any of them is a checkpoint of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.config import OptimizerConfig
from megatron.ops import kernels
from megatron.ops.adamw import adamw_
from megatron.ops.multi_tensor import divide_
from megatron.optimizer.flat_buffer import Shard


@dataclass(frozen=True)
class Stepped:
    """A shard of a flat buffer and the tensor that is updated for it.

    ``weights`` shares the buffer's memory in float32 and float64 and is a float32 master of it in
    half precision.
    """

    shard: Shard
    weights: nn.Parameter

    @classmethod
    def of(cls, shard: Shard) -> Stepped:
        """Of the shard's values as they are now."""
        weights = nn.Parameter(shard.values.to(shard.gradients.dtype))
        weights.grad = shard.gradients
        return cls(shard, weights)

    @property
    def has_master(self) -> bool:
        """Whether the weights are a tensor of their own."""
        return self.weights.dtype != self.shard.buffer.values.dtype


class Update(Protocol):
    """A rule, and the state that it keeps for each weight.

    The state's tensors are allocated once and never replaced.
    """

    def step(self, lr: float, skipped: Tensor, divisor: Tensor | None) -> None:
        """Update weights, state and parameters by the gradients, which are used up by it.

        ``skipped``, bool, says that nothing is to change; the gradients count divided by
        ``divisor``, float64. Both are scalars on the device.
        """

    def state(self, weights: nn.Parameter) -> Mapping[str, Tensor]:
        """The state of a shard's weights by its name, each [n] as they are."""

    def steps(self) -> int:
        """How many were taken; waits for the device. 0 where the rule does not count."""

    def resume(self, steps: int) -> None:
        """Count on from ``steps``."""


def build_update(options: OptimizerConfig, stepped: Sequence[Stepped]) -> Update:
    """The rule that the configuration asks for, by the kernel where there is one."""
    if options.optimizer == "sgd":
        return TorchUpdate(_torch_sgd(options, stepped), stepped)
    weights = [each.weights for each in stepped]
    if weights and all(kernels.active(each) for each in weights):
        return KernelAdamW(options, stepped)
    on_gpu = all(each.is_cuda and each.dtype == torch.float32 for each in weights)
    if weights and on_gpu and kernels.choice() == "apex":
        return ApexAdam(options, stepped)
    return TorchUpdate(_torch_adamw(options, stepped), stepped)


class TorchUpdate:
    """One of torch's fused rules."""

    def __init__(self, fused: torch.optim.Optimizer, stepped: Sequence[Stepped]) -> None:
        self._fused, self._stepped = fused, stepped
        weights = [each.weights for each in stepped]
        # The fused rules take their divisor in float32, too coarse for float64.
        self._exact = any(each.dtype == torch.float64 for each in weights)
        self._divides = self._exact or any(kernels.active(each) for each in weights)

    def step(self, lr: float, skipped: Tensor, divisor: Tensor | None) -> None:
        """As :meth:`Update.step`."""
        if divisor is not None:
            self._divide(divisor if self._exact else divisor.float())
        self._fused.found_inf = skipped.float()  # type: ignore[attr-defined]
        for group in self._fused.param_groups:
            group["lr"] = lr
        self._fused.step()
        _round_masters(self._stepped)

    def state(self, weights: nn.Parameter) -> Mapping[str, Tensor]:
        """As :meth:`Update.state`."""
        return {kind: flat for kind, flat in self._fused.state[weights].items() if kind != "step"}

    def steps(self) -> int:
        """As :meth:`Update.steps`."""
        counts = self._counts()
        return int(counts[0].item()) if counts else 0

    def resume(self, steps: int) -> None:
        """As :meth:`Update.resume`."""
        for count in self._counts():
            count.fill_(steps)

    def _divide(self, divisor: Tensor) -> None:
        if self._divides:
            divide_([each.shard.gradients for each in self._stepped], divisor)
        else:
            self._fused.grad_scale = divisor  # type: ignore[attr-defined]

    def _counts(self) -> list[Tensor]:
        states = (self._fused.state[each.weights] for each in self._stepped)
        return [state["step"] for state in states if "step" in state]


class KernelAdamW:
    """AdamW by the kernel, which also rounds the masters."""

    def __init__(self, options: OptimizerConfig, stepped: Sequence[Stepped]) -> None:
        self._options = options
        self._weights = [each.weights for each in stepped]
        self._gradients = [each.shard.gradients for each in stepped]
        self._rounded = [each.shard.values if each.has_master else None for each in stepped]
        self._decays = [_weight_decay(options, each) for each in stepped]
        self._state = {each: _moments(each) for each in self._weights}
        self._count = torch.zeros((), dtype=torch.float32, device=self._weights[0].device)

    def step(self, lr: float, skipped: Tensor, divisor: Tensor | None) -> None:
        """As :meth:`Update.step`."""
        adamw_(
            self._weights,
            self._rounded,
            self._gradients,
            [self._state[each]["exp_avg"] for each in self._weights],
            [self._state[each]["exp_avg_sq"] for each in self._weights],
            self._decays,
            step=self._count,
            skipped=skipped,
            divisor=None if divisor is None else divisor.float(),
            lr=lr,
            betas=(self._options.adam_beta1, self._options.adam_beta2),
            eps=self._options.adam_eps,
        )

    def state(self, weights: nn.Parameter) -> Mapping[str, Tensor]:
        """As :meth:`Update.state`."""
        return self._state[weights]

    def steps(self) -> int:
        """As :meth:`Update.steps`."""
        return int(self._count.item())

    def resume(self, steps: int) -> None:
        """As :meth:`Update.resume`."""
        self._count.fill_(steps)


class ApexAdam:
    """AdamW by apex.

    It cannot leave out a step that only the device knows to be bad and divides no gradients, so
    that here, and nowhere else, the host waits for the device in every step.
    """

    def __init__(self, options: OptimizerConfig, stepped: Sequence[Stepped]) -> None:
        from apex.optimizers import FusedAdam

        self._stepped = stepped
        groups = [group for group in _parameter_groups(options, stepped) if group["params"]]
        self._adam = FusedAdam(
            groups,
            lr=options.lr,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
            adam_w_mode=True,
        )
        for each in stepped:
            self._adam.state[each.weights] = _moments(each.weights)
        self.resume(0)

    def step(self, lr: float, skipped: Tensor, divisor: Tensor | None) -> None:
        """As :meth:`Update.step`."""
        if skipped.item():
            return
        if divisor is not None:
            divide_([each.shard.gradients for each in self._stepped], divisor.float())
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        _round_masters(self._stepped)

    def state(self, weights: nn.Parameter) -> Mapping[str, Tensor]:
        """As :meth:`Update.state`."""
        state: dict[str, Tensor] = self._adam.state[weights]
        return state

    def steps(self) -> int:
        """As :meth:`Update.steps`."""
        return int(self._adam.param_groups[0]["step"])

    def resume(self, steps: int) -> None:
        """As :meth:`Update.resume`."""
        for group in self._adam.param_groups:
            group["step"] = steps


def _round_masters(stepped: Sequence[Stepped]) -> None:
    for each in stepped:
        if each.has_master:
            each.shard.values.copy_(each.weights)


def _torch_adamw(options: OptimizerConfig, stepped: Sequence[Stepped]) -> torch.optim.Optimizer:
    adam = torch.optim.AdamW(
        _parameter_groups(options, stepped),
        lr=options.lr,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        fused=True,
    )
    for each in stepped:
        count = torch.zeros((), dtype=torch.float32, device=each.weights.device)
        adam.state[each.weights] = {"step": count, **_moments(each.weights)}
    return adam


def _torch_sgd(options: OptimizerConfig, stepped: Sequence[Stepped]) -> torch.optim.Optimizer:
    sgd = torch.optim.SGD(
        _parameter_groups(options, stepped),
        lr=options.lr,
        momentum=options.sgd_momentum,
        fused=True,
    )
    # On meta, where a run is only planned, PyTorch's check would refuse what then works.
    if any(each.weights.is_meta for each in stepped):
        sgd._need_device_dtype_check_for_fused = False
    if options.sgd_momentum > 0:
        # A buffer that torch makes by itself in a skipped first step is left uninitialised.
        for each in stepped:
            zeros = torch.zeros_like(each.weights, requires_grad=False)
            sgd.state[each.weights] = {"momentum_buffer": zeros}
    return sgd


def _moments(weights: nn.Parameter) -> dict[str, Tensor]:
    """Adam's state, but for the count, before the first step."""
    return {
        kind: torch.zeros_like(weights, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")
    }


def _weight_decay(options: OptimizerConfig, stepped: Stepped) -> float:
    return options.weight_decay if stepped.shard.buffer.traits.decayed else 0.0


def _parameter_groups(options: OptimizerConfig, stepped: Sequence[Stepped]) -> list[dict[str, Any]]:
    """One group for what is decayed and one for the rest, be they empty.

    A pipeline stage without layers has nothing to update, and steps all the same.
    """
    decays = {True: options.weight_decay, False: 0.0}
    return [
        {
            "params": [s.weights for s in stepped if s.shard.buffer.traits.decayed is decayed],
            "weight_decay": decay,
        }
        for decayed, decay in decays.items()
    ]
