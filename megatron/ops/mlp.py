"""The activation between an MLP's two products, fused with the bias of the first.

    plain   y = a(x + b)                            [..., f] -> [..., f]
    gated   y = a(g + b_g) (l + b_l), x = [g | l]   [..., 2 f] -> [..., f]   (arXiv 2002.05202)

The backward pass finds the bias' gradient on its way over the rows. Of the forward pass nothing is
held but x, which the product has made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.ops import kernels
from megatron.ops.activation import ACTIVATIONS
from megatron.ops.columns import summed
from megatron.ops.operator import differentiable, operator
from megatron.ops.precision import widened

# As `csrc/cuda/activation.cu` counts them.
KINDS = {"gelu": 0, "gelu_tanh": 1, "silu": 2}


def _columns(x: Tensor, gated: bool) -> int:
    return x.size(-1) // 2 if gated else x.size(-1)


def _forward_kernel(x: Tensor, bias: Tensor | None, kind: str, gated: bool) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    columns = _columns(x, gated)
    y = x.new_empty((*x.shape[:-1], columns))
    if y.numel():
        rows = y.numel() // columns
        kernels.launch(
            "bias_activation_forward", x, bias, y, rows, columns, KINDS[kind], gated, x.dtype
        )
    return y


def _forward_twin(x: Tensor, bias: Tensor | None, kind: str, gated: bool) -> Tensor:
    wide = widened(x) if bias is None else widened(x) + bias
    if not gated:
        return ACTIVATIONS[kind](wide).to(x.dtype).contiguous()
    gate, linear = wide.chunk(2, dim=-1)
    return (ACTIVATIONS[kind](gate) * linear).to(x.dtype)


def _backward_kernel(
    grad: Tensor, x: Tensor, bias: Tensor | None, kind: str, gated: bool
) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    bias = None if bias is None else bias.contiguous()
    columns = _columns(x, gated)
    rows = grad.numel() // columns if columns else 0
    grad_x = torch.empty_like(x)
    parts = None
    if bias is not None:
        count = kernels.number("bias_activation_sums", rows)
        parts = x.new_empty((count, x.size(-1)), dtype=torch.float32)
    if grad.numel():
        kernels.launch(
            "bias_activation_backward",
            *(grad, x, bias, grad_x, parts),
            *(rows, columns, KINDS[kind], gated, x.dtype),
        )
    return grad_x, x.new_empty(0) if parts is None else summed(parts, x.dtype)


def _backward_twin(
    grad: Tensor, x: Tensor, bias: Tensor | None, kind: str, gated: bool
) -> tuple[Tensor, Tensor]:
    grad, wide = widened(grad), widened(x) if bias is None else widened(x) + bias
    gate, linear = wide.chunk(2, dim=-1) if gated else (wide, None)
    slope = _SLOPES[kind](gate)
    if linear is None:
        grad_x = grad * slope
    else:
        grad_x = torch.cat((grad * slope * linear, grad * ACTIVATIONS[kind](gate)), dim=-1)
    grad_bias = x.new_empty(0)
    if bias is not None:
        grad_bias = grad_x.flatten(0, -2).sum(dim=0).to(x.dtype)
    return grad_x.to(x.dtype).contiguous(), grad_bias


def _gelu_slope(x: Tensor) -> Tensor:
    phi = 0.5 * (1.0 + torch.erf(x * 2**-0.5))
    return phi + x * torch.exp(-0.5 * x * x) * (2.0 * torch.pi) ** -0.5


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    scale, cubic = (2.0 / torch.pi) ** 0.5, 0.044715
    t = torch.tanh(scale * (x + cubic * x**3))
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * scale * (1.0 + 3.0 * cubic * x * x)


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


_SLOPES = {"gelu": _gelu_slope, "gelu_tanh": _gelu_tanh_slope, "silu": _silu_slope}


_forward = operator(
    "bias_activation(Tensor x, Tensor? bias, str kind, bool gated) -> Tensor",
    kernel=_forward_kernel,
    twin=_forward_twin,
)
_backward = operator(
    "bias_activation_backward(Tensor grad, Tensor x, Tensor? bias, str kind, bool gated)"
    " -> (Tensor, Tensor)",
    kernel=_backward_kernel,
    twin=_backward_twin,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.kind, ctx.gated = inputs
    ctx.save_for_backward(x, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _backward(grad, x, bias, ctx.kind, ctx.gated)
    return grad_x, None if bias is None else grad_bias, None, None


differentiable("bias_activation", _setup, _differentiate)


def bias_activation(x: Tensor, bias: Tensor | None, kind: str, *, gated: bool) -> Tensor:
    """a(x + b), or gated a(g + b_g) (l + b_l) with x = [g | l].

    Args:
        x: [..., f], gated [..., 2 f].
        bias: as wide as x, or None.
        kind: one of `KINDS`.

    Returns:
        [..., f].
    """
    return _forward(x, bias, kind, gated)
