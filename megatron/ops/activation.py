"""Activations by name: what an MLP does between its two products.

The names are the field's; `gelu` is x Phi(x) (arXiv 1606.08415), `gelu_tanh` its approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron.ops.compiled import fusable

Activation = Callable[[torch.Tensor], torch.Tensor]


def _gelu_10(x: torch.Tensor) -> torch.Tensor:
    """GELU cut off at -10 and 10 (arXiv 2004.09602)."""
    return F.gelu(x).clamp(-10.0, 10.0)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _laplace(x: torch.Tensor, mean: float = math.sqrt(0.5), std: float = 0.282095) -> torch.Tensor:
    """The distribution function of a normal variable (arXiv 2209.10655, section 3.3)."""
    return 0.5 * (1.0 + torch.erf((x - mean) / (std * math.sqrt(2.0))))


def _linear(x: torch.Tensor) -> torch.Tensor:
    return x


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(1.702 x), the coarse approximation of arXiv 1606.08415, section 2."""
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: torch.Tensor) -> torch.Tensor:
    """Squared ReLU (arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_10": _gelu_10,
    "laplace": _laplace,
    "linear": _linear,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@fusable
def activated(x: torch.Tensor, kind: str, *, gated: bool) -> torch.Tensor:
    """a(x), or gated a(g) l with x = [g | l] (arXiv 2002.05202): [..., f or 2 f] -> [..., f]"""
    if not gated:
        return ACTIVATIONS[kind](x)
    gate, linear = x.chunk(2, dim=-1)
    return ACTIVATIONS[kind](gate) * linear
