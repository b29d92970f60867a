"""Normalisation over the last dimension, holding its input and a number for each row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, in the dtype of ``weight``.

    Source: arXiv 1607.06450.
    """
    y = F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), epsilon)
    return y.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        exact = _widened(x)
        scale = (exact.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (exact * scale * weight).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normalised = _widened(x) * scale
        grad = _widened(grad)
        grad_weight = (grad * normalised).flatten(0, -2).sum(dim=0)
        grad = grad * weight
        grad_x = scale * (grad - normalised * (grad * normalised).mean(dim=-1, keepdim=True))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, in the dtype of ``weight``.

    Source: arXiv 1910.07467.
    """
    return _RMSNorm.apply(x, weight, epsilon)


def _widened(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
