"""Products of factors in 8 bits (arXiv 2209.05433).

A factor is scaled so that its largest magnitude becomes the largest number of its format, and
rounded; the product multiplies by both scales again, accumulating in float32. e4m3 has 3 bits
behind the point and reaches 448, e5m2 has 2 and reaches 57344. The hardware sums along the rows of
both factors, a b^T, so that a factor that is summed along its columns must be transposed first.

    kernel   csrc/cuda/fp8.cu, which transposes while it casts
    product  torch._scaled_mm: cuBLAS on a GPU of compute capability 8.9 or newer, oneDNN on the CPU
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.ops import kernels
from megatron.ops.operator import operator

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

# Rows of a factor are whole packs of 16 bytes.
ALIGNMENT = 16

# As `csrc/cuda/fp8.cu` has it: tensors of zeros get a scale, too.
_SMALLEST = 2.0**-96
_OLDEST = (8, 9)  # compute capability


class Factor(NamedTuple):
    """``values`` times ``scale``: 8 bits [m, k], float32 scalar on the same device."""

    values: Tensor
    scale: Tensor


def require_fp8(device: torch.device) -> None:
    """Make sure that products in 8 bits can be computed on a device.

    Raises:
        ConfigError: it is a GPU that is too old.
    """
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if torch.version.cuda is not None and found < _OLDEST:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            "--fp8-format needs a GPU of compute capability {}.{} or newer, "
            "found {} with {}.{}".format(*_OLDEST, name, *found)
        )


def _padded(rows: int) -> int:
    return -(-rows // ALIGNMENT) * ALIGNMENT


def _aligned(x: Tensor) -> Tensor:
    """x as the kernels read it: one row behind the other, from a multiple of 16 bytes on."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def _scale_kernel(x: Tensor, format: torch.dtype, recent: Tensor | None) -> Tensor:
    if x.numel() == 0 or x.numel() % ALIGNMENT:
        return _scale_twin(x, format, recent)
    x = _aligned(x)
    scale = x.new_empty((), dtype=torch.float32)
    parts = x.new_empty(kernels.number("fp8_scale_parts", x.numel()), dtype=torch.int32)
    limit = torch.finfo(format).max
    kernels.launch("fp8_scale", x, recent, parts, scale, x.numel(), limit, x.dtype)
    return scale


def _scale_twin(x: Tensor, format: torch.dtype, recent: Tensor | None) -> Tensor:
    largest = _largest(x)
    if recent is not None:
        largest = torch.where(recent > 0, recent, largest)
    # By a tensor: by a number a GPU would multiply by its rounded inverse.
    return largest.clamp(min=_SMALLEST) / torch.full_like(largest, torch.finfo(format).max)


def _largest(x: Tensor) -> Tensor:
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float32)
    return x.abs().amax().float()


def _cast_kernel(
    x: Tensor,
    scale: Tensor,
    format: torch.dtype,
    as_it_lies: bool,
    transposed: bool,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    if x.numel() == 0:
        return _cast_twin(x, scale, format, as_it_lies, transposed, kept)
    x = _aligned(x)
    values = x.new_empty((rows, columns) if as_it_lies else (0,), dtype=torch.uint8)
    turned = x.new_empty((columns, _padded(rows)) if transposed else (0,), dtype=torch.uint8)
    parts = None
    if kept is not None:
        parts = x.new_empty(kernels.number("fp8_cast_parts", rows, columns), dtype=torch.int32)
    kernels.launch(
        "fp8_cast",
        *(x, scale, values if as_it_lies else None, turned if transposed else None, parts, kept),
        *(rows, columns, _padded(rows), format == E5M2, x.dtype),
    )
    return values, turned


def _cast_twin(
    x: Tensor,
    scale: Tensor,
    format: torch.dtype,
    as_it_lies: bool,
    transposed: bool,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:
    limit = torch.finfo(format).max
    scaled = x.float() * (1.0 / scale)
    # A number that is not finite must not be hidden by being cut off.
    cut = scaled.clamp(-limit, limit).masked_fill(~scaled.isfinite(), torch.nan)
    values = cut.to(format).view(torch.uint8).contiguous()
    nothing = values.new_empty(0)
    if kept is not None:
        kept.copy_(torch.maximum(kept, _largest(x)))
    turned = _transpose_twin(scale, values) if transposed else nothing
    return values if as_it_lies else nothing, turned


def _transpose_kernel(scale: Tensor, values: Tensor) -> Tensor:
    if values.numel() == 0:
        return _transpose_twin(scale, values)
    values = _aligned(values)
    turned = values.new_empty((values.size(1), _padded(values.size(0))))
    kernels.launch("fp8_transpose", values, turned, *values.shape, turned.size(1))
    return turned


def _transpose_twin(scale: Tensor, values: Tensor) -> Tensor:
    rows, columns = values.shape
    turned = values.new_zeros((columns, _padded(rows)))
    turned[:, :rows] = values.t()
    return turned


# Operators pass bytes, which all of PyTorch knows what to do with.
_scale = operator(
    "fp8_scale(Tensor x, ScalarType format, Tensor? recent) -> Tensor",
    kernel=_scale_kernel,
    twin=_scale_twin,
)
_cast = operator(
    "fp8_cast(Tensor x, Tensor scale, ScalarType format, bool as_it_lies, bool transposed,"
    " Tensor(a!)? kept) -> (Tensor, Tensor)",
    kernel=_cast_kernel,
    twin=_cast_twin,
)
# The kernel is chosen by the first tensor, and those of bytes are not known there.
_transpose = operator(
    "fp8_transpose(Tensor scale, Tensor values) -> Tensor",
    kernel=_transpose_kernel,
    twin=_transpose_twin,
)


def fp8_scale(x: Tensor, format: torch.dtype, recent: Tensor | None = None) -> Tensor:
    """The scale that brings x [...] into a format, float32 scalar, on the device.

    ``recent``, a float32 scalar, stands for the largest magnitude of x where it is given and
    positive; x is then not read. A NaN or an infinity in x makes products NaN.
    """
    scale: Tensor = _scale(x, format, recent)
    return scale


def fp8_cast(
    x: Tensor,
    scale: Tensor,
    format: torch.dtype,
    *,
    as_it_lies: bool = True,
    transposed: bool = False,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x / scale in 8 bits, cut off at the format's largest number; what is not finite becomes NaN.

    Args:
        x: [n, k], k divisible by 16.
        kept: float32 scalar that is raised to x's largest magnitude.

    Returns:
        [n, k] and [k, n rounded up to 16], zeros at the end of its rows; empty where not wanted.
    """
    values, turned = _cast(x, scale, format, as_it_lies, transposed, kept)
    return values.view(format), turned.view(format)


def fp8_transpose(factor: Factor) -> Factor:
    """A factor [n, k] transposed: [k, n rounded up to 16], zeros at the end of its rows."""
    values, scale = factor
    return Factor(_transpose(scale, values.view(torch.uint8)).view(values.dtype), scale)


def scaled_product(
    a: Factor, b: Factor, dtype: torch.dtype, *, bias: Tensor | None = None, fast: bool = False
) -> Tensor:
    """a b^T + bias: [m, k], [n, k], [n] -> [m, n] of `dtype`; n and k are divisible by 16.

    ``fast`` lets the hardware sum with fewer bits, as forward passes bear.
    """
    if a.values.numel() == 0 or b.values.numel() == 0:
        return torch.zeros(a.values.size(0), b.values.size(0), dtype=dtype, device=a.values.device)
    if bias is not None and dtype == torch.float32:  # which cuBLAS does not add
        return scaled_product(a, b, dtype, fast=fast) + bias
    return torch._scaled_mm(
        a.values,
        b.values.t(),
        a.scale,
        b.scale,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=fast,
    )
