"""Rotary positions: queries and keys turned by angles that grow with the position.

Source: arXiv 2104.09864. The channels of a head are paired first half with second half, as in the
Llama family. `rotate` turns heads; `split_heads` takes queries, keys and values out of the product
that made them side by side, turned in the same pass, and puts their gradients back in another.

Letters: s sequence, b micro-batch, n heads, g heads of keys and values, d head size, r turned
channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.ops import kernels
from megatron.ops.compiled import fusable
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


@fusable
def rotate(x: Tensor, by: Rotation) -> Tensor:
    """[s, b, n, d] -> [s, b, n, d] with the first r channels of each head turned."""
    half = by.cos.size(-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (first * by.cos - second * by.sin, second * by.cos + first * by.sin)
    return torch.cat((*turned, rest) if rest.size(-1) else turned, dim=-1)


Heads = tuple[Tensor, Tensor, Tensor]


def _move(
    mixed: Tensor, parts: Sequence[Tensor], by: Sequence[Tensor | None], *, joins: bool, back: bool
) -> None:
    """Write the `parts` from `mixed`, which has no gaps, or where it `joins` `mixed` from them."""
    s, b, g, members, d = mixed.shape
    cos, sin = (x if x is None else x.to(mixed.dtype).contiguous() for x in by)
    strides = [_strides(part) for part in parts]
    strides.append([0, 0, 0] if cos is None else _strides(cos))
    if mixed.numel():
        kernels.launch(
            "move_heads",
            *(mixed, cos, sin, *parts, torch.tensor(strides, device="cpu")),
            *(joins, -1.0 if back else 1.0),
            *(s, b, g, members - 2, 0 if cos is None else cos.size(-1), d, mixed.dtype),
        )


def _strides(x: Tensor) -> list[int]:
    """Of the first three dims; where there is but one element, none is needed."""
    return [x.stride(dim) if x.size(dim) > 1 else 0 for dim in range(3)]


def _split_kernel(
    mixed: Tensor, cos: Tensor | None, sin: Tensor | None, shared: int, back: bool
) -> Heads:
    s, b, g, _, d = mixed.shape
    query, key, value = (mixed.new_empty(s, b, n, d) for n in (g * shared, g, g))
    _move(mixed.contiguous(), (query, key, value), (cos, sin), joins=False, back=back)
    return query, key, value


def _split_twin(
    mixed: Tensor, cos: Tensor | None, sin: Tensor | None, shared: int, back: bool
) -> Heads:
    query, key, value = (x.flatten(2, 3) for x in mixed.split((shared, 1, 1), dim=3))
    parts = (_turned(query, cos, sin, back), _turned(key, cos, sin, back), value)
    query, key, value = (x.clone(memory_format=torch.contiguous_format) for x in parts)
    return query, key, value


def _join_kernel(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None, back: bool
) -> Tensor:
    s, b, g, d = key.shape
    mixed = key.new_empty(s, b, g, query.size(2) // g + 2, d)
    parts = [x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value)]
    _move(mixed, parts, (cos, sin), joins=True, back=back)
    return mixed


def _join_twin(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None, back: bool
) -> Tensor:
    query, key = _turned(query, cos, sin, back), _turned(key, cos, sin, back)
    groups = (x.unflatten(2, (key.size(2), -1)) for x in (query, key, value))
    return torch.cat(tuple(groups), dim=3).contiguous()


def _turned(x: Tensor, cos: Tensor | None, sin: Tensor | None, back: bool) -> Tensor:
    if cos is None or sin is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    return rotate(x.to(wide), Rotation(cos, -sin if back else sin)).to(x.dtype)


_split = operator(
    "split_heads(Tensor mixed, Tensor? cos, Tensor? sin, int shared, bool back)"
    " -> (Tensor, Tensor, Tensor)",
    kernel=_split_kernel,
    twin=_split_twin,
)
_join = operator(
    "join_heads(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, bool back)"
    " -> Tensor",
    kernel=_join_kernel,
    twin=_join_twin,
)


def _setup_split(ctx: Any, inputs: tuple[Any, ...], output: Heads) -> None:
    _, cos, sin, _, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate_split(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return _join(*grads, *ctx.saved_tensors, not ctx.back), None, None, None, None


def _setup_join(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, _, cos, sin, ctx.back = inputs
    ctx.shared = query.size(2) // key.size(2)
    ctx.save_for_backward(cos, sin)


def _differentiate_join(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_split(grad, *ctx.saved_tensors, ctx.shared, not ctx.back), None, None, None


differentiable("split_heads", _setup_split, _differentiate_split)
differentiable("join_heads", _setup_join, _differentiate_join)


class _Views(torch.autograd.Function):
    """Queries, keys and values where they are; their gradients are joined in one pass."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor) -> Heads:
        query, key, value = mixed.unbind(3)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _join(*grads, None, None, False)


def split_heads(mixed: Tensor, by: Rotation | None, shared: int) -> Heads:
    """Queries, keys and values, the first two turned as `rotate` does where there is a rotation.

    Args:
        mixed: [s, b, g, shared + 2, d], in each group `shared` queries, their key and their value.
        by: in the format of `mixed`, others are converted to it; constants, without a gradient.

    Returns:
        [s, b, g shared, d], [s, b, g, d] and [s, b, g, d], each a tensor of its own, or views where
        nothing is turned and each key has one query.
    """
    if by is None and shared == 1:
        heads: Heads = _Views.apply(mixed)
        return heads
    split: Heads = _split(mixed, *(by or (None, None)), shared, False)
    return split
