"""What tensors on the meta device stand for: those of a device that a run is planned for.

A dry run (`megatron.planner`) takes the steps of a run with tensors that have shapes and no memory.
Where the code goes one way on a CPU and another on a GPU, it asks here, so that a plan for a GPU
goes the GPU's way on a machine that has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_stands_for = "cuda"


@contextmanager
def planning_for(device_type: str) -> Iterator[None]:
    """Within it tensors on the meta device stand for tensors on a "cpu" or on a "cuda" device."""
    global _stands_for
    before = _stands_for
    _stands_for = device_type
    try:
        yield
    finally:
        _stands_for = before


def device_type(place: Tensor | torch.device) -> str:
    """The type of a tensor's device, or of a device; for meta the one that is planned for."""
    found = place.device.type if isinstance(place, Tensor) else place.type
    return _stands_for if found == "meta" else found
