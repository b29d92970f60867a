"""Through the host's memory, where a library can communicate nothing else.

gloo sends and receives memory of the CPU alone. Over gloo a tensor of an accelerator is therefore
copied to the host, communicated there, and what has come is copied back. That costs what it costs:
it is there so that several processes can share one GPU, which NCCL refuses, and parallelism can be
tried on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron.ops.planned import device_type

GLOO, PLANNED_GLOO = "gloo", "planned_gloo"


def uses_gloo(group: dist.ProcessGroup | None) -> bool:
    """Whether the ranks of ``group`` communicate by gloo, or would."""
    return group is not None and dist.get_backend(group) in (GLOO, PLANNED_GLOO)


def goes_through_host(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether ``tensor`` cannot be handed to the group's library as it lies."""
    return device_type(tensor) != "cpu" and uses_gloo(group)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of ``tensor`` in the host's memory; waits for the device."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def room_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of the host for what is to be copied into ``tensor``, contiguous, unwritten."""
    return torch.empty(tensor.shape, dtype=tensor.dtype)


@contextmanager
def staged(
    tensor: torch.Tensor, group: dist.ProcessGroup | None, *, is_sent: bool = False
) -> Iterator[torch.Tensor]:
    """``tensor`` for an exchange over ``group`` that is done, in place, within the `with` block.

    What ``is_sent`` stays as it is, and autograd may rely on that.
    """
    if not goes_through_host(tensor, group):
        yield tensor
        return
    host = on_host(tensor)
    yield host
    if not is_sent:
        tensor.detach().copy_(host)
