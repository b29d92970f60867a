"""Rotary positions: queries and keys turned by angles that grow with the position.

Source: arXiv 2104.09864. The channels of a head are paired first half with second half, as in the
Llama family.

Letters: s sequence, b micro-batch, n heads, d head size, r turned channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rotation(NamedTuple):
    """cos and sin of the angles, [s, b or 1, 1, r / 2] each."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotation(positions: torch.Tensor, channels: int, base: float, dtype: torch.dtype) -> Rotation:
    """The angles of each position: position / base^(2 i / channels) for pair i.

    positions: i64[s, b or 1].
    """
    pairs = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float64)
    angles = positions[..., None, None].double() / base ** (pairs / channels)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """[s, b, n, d] -> [s, b, n, d] with the first r channels of each head turned."""
    half = by.cos.size(-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (first * by.cos - second * by.sin, second * by.cos + first * by.sin)
    return torch.cat((*turned, rest) if rest.size(-1) else turned, dim=-1)
