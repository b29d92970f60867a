"""Small gradients in half precision, added many at a time into the float32 ones.

Each norm and each bias hands over a gradient of its own, for which a GPU is hardly started. They
wait here for one another, until 64 are together or somebody is about to read the sums: a bucket is
sent, or the backward pass ends. The latter they hear from autograd, within the pass, so that what a
CUDA graph records of it is complete.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.ops import kernels
from megatron.ops.multi_tensor import add_at_

TOGETHER = 64  # of a launch (csrc/cuda/tiles.cuh)
LARGEST = 2**16  # elements; a larger one is worth a launch of its own


class Additions:
    """Gradients that wait to be added into the float32 buffer `flat` [n], one for each place."""

    def __init__(self, flat: Tensor) -> None:
        self._flat = flat
        self._waiting: dict[int, Tensor] = {}

    def takes(self, gradient: Tensor) -> bool:
        """Whether it is small, and a kernel adds it."""
        return gradient.numel() <= LARGEST and kernels.active(gradient)

    def add(self, start: int, gradient: Tensor) -> None:
        """Have `gradient` added from `start` on before the backward pass ends that this is part of.

        Nobody may change it any more.
        """
        if start in self._waiting:
            self.flush()
        if not self._waiting:
            torch.autograd.Variable._execution_engine.queue_callback(self.flush)
        self._waiting[start] = gradient.contiguous()
        if len(self._waiting) == TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Add what waits."""
        if self._waiting:
            add_at_(self._flat, list(self._waiting), list(self._waiting.values()))
        self._waiting.clear()

    def drop(self) -> None:
        """Forget what a backward pass has left behind that failed."""
        self._waiting.clear()
