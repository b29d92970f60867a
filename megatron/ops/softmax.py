"""The softmax of attention scores, scaled, over the keys that a query may see.

    forward    y  = softmax(scale x), zero where a key is hidden
    backward   dx = scale y (dy - sum(dy y)), the sum over the keys

Keys are hidden by a mask, by being ahead of their query, or by both. A query that may see none has
NaN for weights. Nothing is held for the backward pass but y, which the product with the values
holds, too.

Letters: b micro-batch, n heads, s sequence, z sequence of the keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.ops import kernels
from megatron.ops.operator import differentiable, operator


def _forward_kernel(x: Tensor, seen: Tensor | None, scale: float, causal: bool) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    strides: tuple[int, ...] = (0, 0, 0)
    if seen is not None:
        # Read along the keys as it lies, and with a stride of 0 where it broadcasts.
        seen = seen.expand(*seen.shape[:-1], x.size(-1)).contiguous().expand(x.shape)
        strides = seen.stride()[:3]
    if y.numel():
        kernels.launch(
            "scaled_softmax_forward", x, seen, y, *x.shape, *strides, causal, scale, x.dtype
        )
    return y


def _forward_twin(x: Tensor, seen: Tensor | None, scale: float, causal: bool) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    if seen is not None:
        wide = wide.masked_fill(~seen, float("-inf"))
    if causal:
        ahead = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        wide = wide.masked_fill(ahead, float("-inf"))
    return torch.softmax(wide, dim=-1).to(x.dtype).contiguous()


def _backward_kernel(grad: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    grad, y = grad.contiguous(), y.contiguous()
    grad_x = torch.empty_like(y)
    if y.numel():
        queries, columns = y.shape[-2:]
        kernels.launch(
            "scaled_softmax_backward",
            *(grad, y, grad_x, y.numel() // columns, queries, columns, causal, scale, y.dtype),
        )
    return grad_x


def _backward_twin(grad: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    dtype = torch.promote_types(y.dtype, torch.float32)
    wide, weights = grad.to(dtype), y.to(dtype)
    shared = (wide * weights).sum(dim=-1, keepdim=True)
    return (scale * weights * (wide - shared)).to(y.dtype).contiguous()


_forward = operator(
    "scaled_softmax(Tensor x, Tensor? seen, float scale, bool causal) -> Tensor",
    kernel=_forward_kernel,
    twin=_forward_twin,
)
_backward = operator(
    "scaled_softmax_backward(Tensor grad, Tensor y, float scale, bool causal) -> Tensor",
    kernel=_backward_kernel,
    twin=_backward_twin,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (y,) = ctx.saved_tensors
    return _backward(grad, y, ctx.scale, ctx.causal), None, None, None


differentiable("scaled_softmax", _setup, _differentiate)


def scaled_softmax(
    scores: Tensor, seen: Tensor | None = None, *, scale: float = 1.0, causal: bool = False
) -> Tensor:
    """The weights softmax(scale scores) over the keys that may be seen.

    Args:
        scores: [b, n, s, z].
        seen: bool of four dimensions that broadcasts to the scores, True where a key may be seen;
            None where all may.
        scale: above 0.
        causal: query i sees the keys up to its own place alone, as in a lower triangle [s, z].

    Returns:
        [b, n, s, z].
    """
    assert scale > 0.0 and scores.dim() == 4
    assert seen is None or (seen.dim() == 4 and seen.dtype == torch.bool)
    return _forward(scores, seen, scale, causal)
