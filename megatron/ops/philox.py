"""Random numbers as a pure function of a key and a place.

Philox 4x32 with ten rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011),
in PyTorch; `csrc/cuda/philox.cuh` says the same for kernels. Element e of draw d of a key is word
e % 4 of the counter (e / 4, d). The backward pass, and a recomputed forward pass, find again what
was dropped, and nothing has to be kept of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


class Draw(NamedTuple):
    """Where random numbers come from.

    Attributes:
        key: i64[1] on the device, so that a recorded step can be replayed with another one.
        number: which of the key's draws.
    """

    key: Tensor
    number: int


def threshold(probability: float) -> int:
    """The words below which an element is dropped."""
    return min(round(probability * 2**32), 2**32 - 1)


def words(draw: Draw, count: int) -> Tensor:
    """The first `count` words of a draw, i64[count] from 0 to 2^32 - 1."""
    if draw.key.is_meta:  # nothing but the shape is wanted
        return torch.empty(count, dtype=torch.int64, device=draw.key.device)
    groups = torch.arange((count + 3) // 4, device=draw.key.device)
    key = [draw.key & _WORD, (draw.key >> 32) & _WORD]
    counter = [
        groups & _WORD,
        groups >> 32,
        torch.full_like(groups, draw.number & _WORD),
        torch.full_like(groups, draw.number >> 32),
    ]
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], counter[0])
        high1, low1 = _product(_MULTIPLIERS[1], counter[2])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(k + step) & _WORD for k, step in zip(key, _KEY_STEPS, strict=True)]
    return torch.stack(counter, dim=1).flatten()[:count]


def kept(draw: Draw, shape: torch.Size, probability: float) -> Tensor:
    """Which elements of a contiguous tensor stay where each is dropped with `probability`, bool."""
    return (words(draw, shape.numel()) >= threshold(probability)).view(shape)


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of the product of two words; int64 has no room for all of it."""
    # Each is below 2^48, and the product is upper 2^16 + lower.
    upper, lower = (b >> 16) * a, (b & 0xFFFF) * a
    low_part = ((upper & 0xFFFF) << 16) + lower
    return (upper >> 16) + (low_part >> 32), low_part & _WORD
