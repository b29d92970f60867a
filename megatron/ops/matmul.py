"""Matrix products, by the faster of the libraries at hand.

On the CPU PyTorch hands float32 products to MKL, which on AMD's processors runs at about half the
speed of oneDNN, the other library that PyTorch is built with. There they go to oneDNN. The choice
depends on the kind of processor alone, so that a run gives the same bits each time.

On a GPU the product of two matrices in half precision is added to a float32 one by the product
itself, where PyTorch can do that: nothing as large is written in between, and nothing rounded.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron.ops.planned import device_type


@cache
def prefers_onednn() -> bool:
    """Whether float32 products on this machine's CPU go to oneDNN."""
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return False
    try:
        description = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "AuthenticAMD" in description


def linear_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + b: [..., in], [out, in], [out] -> [..., out]; records nothing for autograd."""
    if not _goes_to_onednn(x):
        return F.linear(x, weight, bias)
    y = _onednn(x.flatten(0, -2), weight, bias)
    # Not a view for autograd, which may be told later that it is changed in place.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.size(0)))


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b: [m, k], [k, n] -> [m, n]; records nothing for autograd."""
    return _onednn(a, b.t(), None) if _goes_to_onednn(a) else a @ b


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b in place: [m, n], [m, k], [k, n]; ``total`` may have a wider format."""
    if total.dtype == a.dtype and not _goes_to_onednn(a):
        total.addmm_(a, b)
    elif device_type(a) != "cpu" and adds_wide(a.device, a.dtype, total.dtype):
        _add_wide(total, a, b)
    else:
        total.add_(product(a, b))


@cache
def adds_wide(device: torch.device, narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether a product in one format can be added to a matrix of another one in place there.

    It is tried out on numbers that are exact in both, and whose sums are not; the device is waited
    for at the first call.
    """
    if device.type == "meta":  # as today's GPUs
        return True
    a = (torch.arange(40 * 24) % 7 - 3).view(40, 24)
    b = (torch.arange(40 * 16) % 5 - 2).view(40, 16)
    total = (1000 + torch.arange(24 * 16)).view(24, 16)
    found = total.to(device, wide)
    try:
        _add_wide(found, a.to(device, narrow).t(), b.to(device, narrow))
    except (AttributeError, RuntimeError):  # no such operator, or not on this device
        return False
    return torch.equal(found.cpu(), (total + a.t() @ b).to(wide))


def _add_wide(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)


def _goes_to_onednn(x: torch.Tensor) -> bool:
    on_cpu = device_type(x) == "cpu" and x.dtype == torch.float32
    return on_cpu and x.dim() > 1 and x.numel() > 0 and prefers_onednn()


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.is_meta:  # where a run is only planned, a product like any other
        return F.linear(x, weight, bias)
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
