"""Rotary positions: queries and keys turned by angles that grow with the position.

Source: arXiv 2104.09864. The channels of a head are paired first half with second half, as in the
Llama family. `rotate` turns heads; `rotate_packed` turns queries and keys where they lie side by
side with the values, in one pass.

Letters: s sequence, b micro-batch, n heads, g heads of keys and values, d head size, r turned
channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.ops import kernels
from megatron.ops.operator import differentiable, operator


class Rotation(NamedTuple):
    """cos and sin of the angles, [s, b or 1, 1, r / 2] each."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, channels: int, base: float, dtype: torch.dtype) -> Rotation:
    """The angles of each position: position / base^(2 i / channels) for pair i.

    positions: i64[s, b or 1].
    """
    pairs = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float64)
    angles = positions[..., None, None].double() / base ** (pairs / channels)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """[s, b, n, d] -> [s, b, n, d] with the first r channels of each head turned."""
    half = by.cos.size(-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (first * by.cos - second * by.sin, second * by.cos + first * by.sin)
    return torch.cat((*turned, rest) if rest.size(-1) else turned, dim=-1)


def _packed_kernel(mixed: Tensor, cos: Tensor, sin: Tensor, shared: int, back: bool) -> Tensor:
    mixed = mixed.contiguous()
    cos, sin = (each.to(mixed.dtype).contiguous() for each in (cos, sin))
    turned = torch.empty_like(mixed)
    if mixed.numel():
        half, size = cos.size(-1), mixed.size(-1)
        rows = cos.numel() // half
        heads = mixed.numel() // size // rows
        kernels.launch(
            "rotate_packed",
            *(mixed, cos, sin, turned, -1.0 if back else 1.0),
            *(rows, heads, shared + 2, half, size, mixed.dtype),
        )
    return turned


def _packed_twin(mixed: Tensor, cos: Tensor, sin: Tensor, shared: int, back: bool) -> Tensor:
    wide = torch.promote_types(mixed.dtype, torch.float32)
    cos, sin = (each.to(wide).unsqueeze(-2) for each in (cos, sin))
    heads, value = mixed.to(wide).split((shared + 1, 1), dim=3)
    turned = rotate(heads, Rotation(cos, -sin if back else sin))
    return torch.cat((turned, value), dim=3).to(mixed.dtype)


_packed = operator(
    "rotate_packed(Tensor mixed, Tensor cos, Tensor sin, int shared, bool back) -> Tensor",
    kernel=_packed_kernel,
    twin=_packed_twin,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.shared, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _packed(grad, *ctx.saved_tensors, ctx.shared, not ctx.back), None, None, None, None


differentiable("rotate_packed", _setup, _differentiate)


def rotate_packed(mixed: Tensor, by: Rotation, shared: int) -> Tensor:
    """Queries and keys turned as `rotate` does, the values beside them copied.

    The angles are constants: they get no gradient.

    Args:
        mixed: [s, b, g, shared + 2, d], in each group `shared` queries, their key and their value.
        by: in the format of `mixed`; others are converted to it.

    Returns:
        as `mixed`.
    """
    return _packed(mixed, *by, shared, False)
