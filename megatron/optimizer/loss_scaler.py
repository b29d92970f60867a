"""The factor by which the loss is multiplied before backward in float16.

Small gradients would vanish in float16; a large factor keeps them, and one too large overflows. The
dynamic scaler looks for the largest factor that does not: it doubles after ``window`` good steps
and halves once ``hysteresis`` overflows have been seen since the last doubling.

All of its state are tensors on the device and :meth:`DynamicLossScaler.update` reads nothing back,
so that the training loop never waits for the device.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron.config import Config

GROWTH = 2.0
BACKOFF = 0.5


class LossScaler(Protocol):
    """What the optimizer asks of a scaler.

    ``scale`` is a float32 scalar on the device; ``neutral`` says that it is 1 for good.
    """

    scale: Tensor
    neutral: bool

    def update(self, overflow: Tensor) -> None:
        """Adjust the scale after a step; ``overflow`` is a bool scalar on the device."""

    def state_dict(self) -> dict[str, float]:
        """The state as plain numbers; waits for the device."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from :meth:`state_dict`'s numbers."""


class ConstantLossScaler:
    """A factor that the user has chosen, or 1 where no scaling is needed."""

    def __init__(self, scale: float, device: torch.device | str) -> None:
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self.neutral = scale == 1.0

    def update(self, overflow: Tensor) -> None:
        """Leave the scale as it is."""

    def state_dict(self) -> dict[str, float]:
        """Nothing: a constant is the configuration's."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Keep the configuration's constant, whatever the checkpoint's run used."""


class DynamicLossScaler:
    """The factor found by doubling and halving.

    ``initial`` and ``minimum`` are factors, ``window`` counts steps, ``hysteresis`` overflows.
    """

    def __init__(
        self,
        *,
        initial: float,
        minimum: float,
        window: int,
        hysteresis: int,
        device: torch.device | str,
    ) -> None:
        self.scale = torch.tensor(initial, dtype=torch.float32, device=device)
        self.neutral = False
        self._good_steps = torch.tensor(0, dtype=torch.int32, device=device)
        self._tolerance = torch.tensor(hysteresis, dtype=torch.int32, device=device)
        self._minimum = minimum
        self._window = window
        self._hysteresis = hysteresis

    def update(self, overflow: Tensor) -> None:
        """Adjust the scale after a step; ``overflow`` is a bool scalar on the device.

        Between two doublings the tolerance is used up once: every later overflow halves at once.
        """
        good_steps = (self._good_steps + 1).masked_fill(overflow, 0)
        tolerance = self._tolerance - overflow.to(torch.int32)
        halve = overflow & (tolerance <= 0)
        double = good_steps == self._window
        halved = (self.scale * BACKOFF).clamp(min=self._minimum)
        scale = torch.where(halve, halved, self.scale)
        # In place: the runtime and the metrics hold on to these tensors.
        self.scale.copy_(torch.where(double, scale * GROWTH, scale))
        self._good_steps.copy_(good_steps.masked_fill(double, 0))
        self._tolerance.copy_(tolerance.masked_fill(double, self._hysteresis))

    def state_dict(self) -> dict[str, float]:
        """The state as plain numbers; waits for the device."""
        return {
            "scale": self.scale.item(),
            "good_steps": self._good_steps.item(),
            "tolerance": self._tolerance.item(),
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from :meth:`state_dict`'s numbers; without them keep the initial state."""
        if state:
            self.scale.fill_(state["scale"])
            self._good_steps.fill_(state["good_steps"])
            self._tolerance.fill_(state["tolerance"])


def build_loss_scaler(config: Config, device: torch.device | str) -> LossScaler:
    """The scaler that ``config`` asks for: its constant, the dynamic one for float16, else 1."""
    options = config.optimizer
    if options.loss_scale is not None:
        return ConstantLossScaler(options.loss_scale, device)
    if not config.model.fp16:
        return ConstantLossScaler(1.0, device)
    return DynamicLossScaler(
        initial=options.initial_loss_scale,
        minimum=options.min_loss_scale,
        window=options.loss_scale_window,
        hysteresis=options.hysteresis,
        device=device,
    )
