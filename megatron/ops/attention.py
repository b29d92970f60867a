"""The attention core: softmax(q k^T / sqrt(d)) v.

Letters: s sequence, b micro-batch, n heads of this rank, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def padding_mask(real: torch.Tensor) -> torch.Tensor | None:
    """The attention core's mask for keys that are padding.

    Args:
        real: bool[b, s], True where a token is real.

    Returns:
        bool[b, 1, 1, s], or None where it is known at no cost that nothing is padding.
    """
    # Only the CPU can look without waiting for a device.
    if real.device.type == "cpu" and bool(real.all()):
        return None
    return real[:, None, None, :]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Scaled dot-product attention through PyTorch's fused implementations.

    Args:
        query, key, value: [s, b, n, d].
        mask: bool, broadcastable to [b, n, s, s], True where a query may look; None for all.
        dropout: probability with which an attention weight is dropped.

    Returns:
        [s, b, n * d].
    """
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, d]
    context = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout)
    return context.permute(2, 0, 1, 3).flatten(2)
