"""The rate of a product of two square matrices: the limit that a step is held against.

PyTorch has two ways to multiply on the CPU, and which is faster depends on the processor: the BLAS
that it was built with, behind `@`, and oneDNN. The limit is the faster one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.peers import AbsentError
from benchmarks.peers.sizes import Sizes

MATRIX = 2048
FLOPS = 2.0 * MATRIX**3


def build(sizes: Sizes, layout: str) -> Callable[[], float]:
    """A product by BLAS ("blas") or by oneDNN ("onednn"); returns nothing of interest."""
    left, right = torch.randn(2, MATRIX, MATRIX).unbind()
    if layout == "blas":
        return lambda: float((left @ right)[0, 0])
    if not torch.backends.mkldnn.is_available():
        raise AbsentError("PyTorch is built without oneDNN")
    product = torch.ops.mkldnn._linear_pointwise
    return lambda: float(product(left, right, None, "none", [], "")[0, 0])
