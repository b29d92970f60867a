"""Dropout, by PyTorch's generator and by counter, the latter with what stands around it.

    y = r + m (x + b) / (1 - p),   m is 0 with probability p and else 1 (arXiv 1207.0580)

`bias_dropout_add` reads a block's result x and the residual stream r once and writes the sum. Which
elements stay is a function of a key and of their place (`philox.py`): the backward pass finds it
again and holds nothing of the forward pass. On its way it sums the bias' gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.ops import kernels, philox
from megatron.ops.columns import summed
from megatron.ops.compiled import fusable
from megatron.ops.operator import differentiable, operator
from megatron.ops.philox import Draw
from megatron.ops.precision import widened


def dropout(x: Tensor, probability: float) -> Tensor:
    """Drop elements of ``x`` with ``probability`` and scale up the others (arXiv 1207.0580).

    The backward pass holds one byte for each element.
    """
    if probability == 0.0:
        return x
    # Named directly: the common entry point holds a factor of the input's own format on the CPU.
    return torch.native_dropout(x, probability, True)[0]


@fusable
def dropout_add(x: Tensor, residual: Tensor, probability: float) -> Tensor:
    """residual + dropout(x), by PyTorch's generator."""
    return residual + dropout(x, probability)


def _scale(probability: float) -> float:
    return 1.0 / (1.0 - probability) if probability < 1.0 else 0.0


def _drawn(number: int, probability: float) -> tuple[int, int, float]:
    """What the kernels take of a draw beside its key."""
    return number, philox.threshold(probability), _scale(probability)


def _forward_kernel(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    key: Tensor | None,
    number: int,
    probability: float,
) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x if residual is None else residual)
    if y.numel():
        columns = x.size(-1)
        kernels.launch(
            "bias_dropout_add_forward",
            *(x, bias, residual, y, key, *_drawn(number, probability)),
            *(x.numel() // columns, columns, x.dtype, y.dtype),
        )
    return y


def _forward_twin(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    key: Tensor | None,
    number: int,
    probability: float,
) -> Tensor:
    wide = widened(x) if bias is None else widened(x) + bias
    wide = _dropped(wide, key, number, probability)
    if residual is None:
        return wide.to(x.dtype, copy=True).contiguous()
    return (widened(residual) + wide).to(residual.dtype).contiguous()


def _backward_kernel(
    grad: Tensor,
    key: Tensor | None,
    number: int,
    probability: float,
    dtype: torch.dtype,
    wants_x: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    columns = grad.size(-1)
    rows = grad.numel() // columns if columns else 0
    grad_x, parts = None, None
    if wants_x:
        grad_x = torch.empty_like(grad, dtype=dtype)
    if wants_bias:
        count = kernels.number("bias_dropout_add_sums", rows)
        parts = grad.new_empty((count, columns), dtype=torch.float32)
    if grad.numel():
        kernels.launch(
            "bias_dropout_add_backward",
            *(grad, grad_x, parts, key, *_drawn(number, probability)),
            *(rows, columns, dtype, grad.dtype),
        )
    nothing = grad.new_empty(0, dtype=dtype)
    grad_bias = nothing if parts is None else summed(parts, dtype)
    return nothing.clone() if grad_x is None else grad_x, grad_bias


def _backward_twin(
    grad: Tensor,
    key: Tensor | None,
    number: int,
    probability: float,
    dtype: torch.dtype,
    wants_x: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor]:
    wide = _dropped(widened(grad), key, number, probability)
    grad_x, grad_bias = (grad.new_empty(0, dtype=dtype) for _ in range(2))
    if wants_x:
        grad_x = wide.to(dtype, copy=True).contiguous()
    if wants_bias:
        grad_bias = wide.flatten(0, -2).sum(dim=0).to(dtype)
    return grad_x, grad_bias


def _dropped(x: Tensor, key: Tensor | None, number: int, probability: float) -> Tensor:
    if key is None:
        return x
    stays = philox.kept(Draw(key, number), x.shape, probability)
    return torch.where(stays, x * _scale(probability), 0.0)


# The number is symbolic where the step is compiled, so that layers share what was made of one.
_forward = operator(
    "bias_dropout_add(Tensor x, Tensor? bias, Tensor? residual, Tensor? key, SymInt number,"
    " float probability) -> Tensor",
    kernel=_forward_kernel,
    twin=_forward_twin,
)
_backward = operator(
    "bias_dropout_add_backward(Tensor grad, Tensor? key, SymInt number, float probability,"
    " ScalarType dtype, bool wants_x, bool wants_bias) -> (Tensor, Tensor)",
    kernel=_backward_kernel,
    twin=_backward_twin,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, residual, key, ctx.number, ctx.probability = inputs
    ctx.dtype, ctx.has = x.dtype, (bias is not None, residual is not None)
    ctx.save_for_backward(key)  # so that a key written over before the backward pass is an error


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (key,) = ctx.saved_tensors
    has_bias, has_residual = ctx.has
    is_same = key is None and grad.dtype == ctx.dtype
    grad_x, grad_bias = grad, None
    if has_bias or not is_same:
        drawn = key, ctx.number, ctx.probability
        made, grad_bias = _backward(grad, *drawn, ctx.dtype, not is_same, has_bias)
        grad_x = grad if is_same else made
    return grad_x, grad_bias if has_bias else None, grad if has_residual else None, None, None, None


differentiable("bias_dropout_add", _setup, _differentiate)


def bias_dropout_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    probability: float,
    draw: Draw | None,
) -> Tensor:
    """residual + dropout(x + bias) in one pass; without a residual dropout(x + bias) alone.

    Args:
        x: [..., h].
        bias: [h] in x's format, or None.
        residual: as x, in any format, which the result has, or None.
        probability: of an element to be dropped; the others are scaled up.
        draw: decides which elements are dropped; not needed where `probability` is 0.

    Returns:
        as `residual`, or as x.
    """
    if probability == 0.0:
        draw = None
    assert draw is not None or probability == 0.0
    key, number = (None, 0) if draw is None else draw
    return _forward(x, bias, residual, key, number, probability)
