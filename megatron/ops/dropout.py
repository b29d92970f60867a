"""Dropout whose backward pass holds one byte for each element."""

from __future__ import annotations

import torch


def dropout(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Drop elements of ``x`` with ``probability`` and scale up the others (arXiv 1207.0580)."""
    if probability == 0.0:
        return x
    # Named directly: the common entry point holds a factor of the input's own format on the CPU.
    return torch.native_dropout(x, probability, True)[0]
