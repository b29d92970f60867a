"""The addition that ends a layer and the norm that begins the next, in one pass.

    total = residual + dropout(x + bias)
    y     = norm(total)

The norm sees the total as it is stored. The backward pass needs the total and what the norm keeps
of it; what was dropped it draws again, and the bias' gradient it finds on its way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.ops.norm import backward_kernel, backward_twin, forward_kernel, forward_twin
from megatron.ops.operator import differentiable, operator
from megatron.ops.philox import Draw, kept
from megatron.ops.precision import widened


def norm_after_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    epsilon: float,
    *,
    probability: float,
    draw: Draw | None,
) -> tuple[Tensor, Tensor]:
    """residual + dropout(x + bias), and its norm: LayerNorm with ``norm_bias``, else RMSNorm.

    Args:
        x: [..., h] in the format of ``weight``.
        bias: [h] or None.
        residual: [..., h] in a format of its own, which the sum has, too.
        weight: [h].
        norm_bias: [h] or None.
        probability: of an element to be dropped, from 0 to below 1; those that stay are
            multiplied by 1 / (1 - probability).
        draw: where the random numbers come from; None where nothing is dropped.

    Returns:
        The sum, [..., h] in the residual's format, and y, [..., h] in the weight's.
    """
    key, number = (draw.key, draw.number) if draw is not None and probability > 0 else (None, 0)
    probability = 0.0 if key is None else probability
    parameters = weight, norm_bias, epsilon
    total, y, _, _ = _forward(x, bias, residual, *parameters, probability, key, number)
    return total, y


def _forward_twin(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    epsilon: float,
    probability: float,
    key: Tensor | None,
    draw: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    added = widened(x) if bias is None else widened(x) + bias
    if key is not None:
        added = torch.where(kept(Draw(key, draw), x.shape, probability), added, 0.0)
        added = added / (1.0 - probability)
    total = (widened(residual) + added).to(residual.dtype).contiguous()
    return total, *forward_twin(total, weight, norm_bias, epsilon)


_forward = operator(
    "norm_after_add(Tensor x, Tensor? bias, Tensor residual, Tensor weight, Tensor? norm_bias,"
    " float epsilon, float probability, Tensor? key, int draw)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=forward_kernel,
    twin=_forward_twin,
)
_backward = operator(
    "norm_after_add_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor weight,"
    " Tensor? mean, Tensor rstd, bool added, bool bias, float probability, Tensor? key, int draw)"
    " -> (Tensor, Tensor, Tensor)",
    kernel=backward_kernel,
    twin=backward_twin,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, bias, _, weight, norm_bias, _, ctx.probability, key, ctx.draw = inputs
    total, _, mean, rstd = output
    ctx.has_bias, ctx.centred = bias is not None, norm_bias is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, mean, rstd, key)


def _differentiate(
    ctx: Any, grad_total: Tensor | None, grad: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    total, weight, mean, rstd, key = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(total, dtype=weight.dtype)
    grad_residual, grad_x, sums = _backward(
        *(grad, grad_total, total, weight, mean if ctx.centred else None, rstd),
        *(True, ctx.has_bias, ctx.probability, key, ctx.draw),
    )
    parameters = iter(sums)
    grad_weight = next(parameters)
    grad_norm_bias = next(parameters) if ctx.centred else None
    grad_bias = next(parameters) if ctx.has_bias else None
    if not grad_x.numel():
        grad_x = grad_residual
    return grad_x, grad_bias, grad_residual, grad_weight, grad_norm_bias, *([None] * 4)


differentiable("norm_after_add", _setup, _differentiate)
