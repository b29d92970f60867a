"""The second stage of gradients that are sums over rows (`csrc/cuda/column_sums.cu`)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops import kernels


def summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """f32[parts, columns], which a kernel has left, to [columns]; runs only as a kernel."""
    total = parts.new_empty(parts.size(1), dtype=dtype)
    kernels.launch("column_sums", parts, total, *parts.shape, dtype)
    return total
