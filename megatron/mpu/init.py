"""Initial values that do not depend on the layout.

The value of every weight is a function of (seed, global name, global index), so that any split
of the model starts from the weights that one process starts from. The function is a counter-based
generator: the index is hashed with SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) under a key
made of seed and name, and the 64 bits become two uniform numbers and, where asked for, one normal
number (Box and Muller, 1958). No rank draws more than its own part.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from megatron.mpu.parallel_state import Axis
from megatron.mpu.random import stream_seed
from megatron.mpu.shard_spec import Rectangle, ShardSpec

# (spec, global flat indices i64[n]) -> f64[n]
InitMethod = Callable[[ShardSpec, torch.Tensor], torch.Tensor]

# Values drawn at a time: the float64 temporaries stay small beside any weight worth splitting.
_BLOCK = 1 << 18


def zeros(spec: ShardSpec, indices: torch.Tensor) -> torch.Tensor:
    """All zeros."""
    return torch.zeros_like(indices, dtype=torch.float64)


def ones(spec: ShardSpec, indices: torch.Tensor) -> torch.Tensor:
    """All ones."""
    return torch.ones_like(indices, dtype=torch.float64)


def normal(std: float, seed: int) -> InitMethod:
    """N(0, std**2)."""

    def draw(spec: ShardSpec, indices: torch.Tensor) -> torch.Tensor:
        first, second = _uniforms(seed, spec.key, indices)
        return std * torch.sqrt(-2.0 * torch.log(first)) * torch.cos(2.0 * math.pi * second)

    return draw


def xavier_uniform(seed: int) -> InitMethod:
    """U(-a, a) with a = sqrt(6 / (fan_in + fan_out)) of the global [out, in] matrix.

    Source: Glorot and Bengio, AISTATS 2010, equation 16.
    """

    def draw(spec: ShardSpec, indices: torch.Tensor) -> torch.Tensor:
        bound = math.sqrt(6.0 / sum(spec.shape))
        return bound * (2.0 * _uniforms(seed, spec.key, indices)[0] - 1.0)

    return draw


def create_parameter(
    spec: ShardSpec,
    axis: Axis,
    init_method: InitMethod,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Parameter:
    """This tensor rank's part of the parameter that ``spec`` describes, with its initial values.

    Vocabulary padding is zero. On the meta device no value is computed.

    Returns:
        parameter of shape ``spec.local_shape(axis.size)`` with ``shard_spec`` attached.
    """
    local = torch.zeros(spec.local_shape(axis.size), dtype=dtype, device=device)
    if not local.is_meta:
        for rectangle in spec.rectangles(axis.rank, axis.size):
            _fill(local[rectangle.local_slices], spec, rectangle, init_method)
    parameter = nn.Parameter(local)
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    return parameter


def _fill(target: torch.Tensor, spec: ShardSpec, box: Rectangle, method: InitMethod) -> None:
    """Fill ``target``, the box of a local tensor, a few rows at a time."""
    rows, row_length = box.sizes[0], math.prod(box.sizes[1:])
    step = max(1, _BLOCK // max(1, row_length))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        indices = _flat_indices(spec, box, start, stop, target.device)
        target[start:stop] = method(spec, indices.flatten()).view(indices.shape).to(target.dtype)


def _flat_indices(
    spec: ShardSpec, box: Rectangle, start: int, stop: int, device: torch.device
) -> torch.Tensor:
    """Global row-major index of every element in rows [start, stop) of the box."""
    sizes = (stop - start, *box.sizes[1:])
    offsets = (box.global_offsets[0] + start, *box.global_offsets[1:])
    indices = torch.zeros((1,) * len(sizes), dtype=torch.int64, device=device)
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        stride = math.prod(spec.shape[dim + 1 :])
        along = torch.arange(offset, offset + size, device=device) * stride
        indices = indices + along.view([-1 if d == dim else 1 for d in range(len(sizes))])
    return indices


def _uniforms(seed: int, name: str, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent uniform numbers in the open interval (0, 1) per index, f64[n] each."""
    bits = _splitmix64(stream_seed("init", seed, name), indices)
    mask, scale = (1 << 32) - 1, 2.0**-32
    first, second = (bits >> 32) & mask, bits & mask
    return (first.double() + 0.5) * scale, (second.double() + 0.5) * scale


def _splitmix64(key: int, indices: torch.Tensor) -> torch.Tensor:
    """64 well-mixed bits per index; int64 arithmetic wraps, as the generator wants."""
    mixed = (indices + 1) * _signed(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ _shift(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shift(mixed, 31)


def _shift(value: torch.Tensor, count: int) -> torch.Tensor:
    """Logical right shift: the arithmetic one of int64 with the copies of the sign masked out."""
    return (value >> count) & ((1 << (64 - count)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
