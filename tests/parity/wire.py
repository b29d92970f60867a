"""A record of what a rank puts on the wire.

The methods of `torch.distributed.ProcessGroup` are watched, below everything that can start a
collective from Python, so that none escapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

WATCHED = (
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)


class Call(NamedTuple):
    """One collective or message: its kind, the ranks of its group, and its tensors' bytes."""

    kind: str
    ranks: tuple[int, ...]
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that leave this rank, an all-reduce being made of a reduce-scatter and a gather."""
        size = len(self.ranks)
        return (
            self.bytes * {"send": 1.0, "recv": 0.0, "allreduce": 2 * (size - 1) / size}[self.kind]
        )


@contextmanager
def recorded() -> Iterator[Counter[Call]]:
    """Within it, every collective and message of this process is counted."""
    calls: Counter[Call] = Counter()
    # From the dictionary of the class: what getattr gives could not be put back as a method.
    methods = {name: vars(dist.ProcessGroup)[name] for name in WATCHED}

    def watched(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: dist.ProcessGroup, *arguments: Any, **named: Any) -> Any:
            tensors = _tensors(arguments[:1])
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            calls[Call(kind, tuple(dist.get_process_group_ranks(group)), size)] += 1
            return method(group, *arguments, **named)

        return call

    for name, method in methods.items():
        setattr(dist.ProcessGroup, name, watched(name, method))
    try:
        yield calls
    finally:
        for name, method in methods.items():
            setattr(dist.ProcessGroup, name, method)


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []
