"""One rank of a cluster that is not there.

`torch.distributed` lets a process group be written in Python. The groups here have the ranks of a
whole cluster and no other process: whatever is handed to them is noted, and counts as done. So one
process can be any rank, make its groups by `ParallelState.create` and take its steps, with tensors
on the meta device, which have a shape and no memory.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mpu import ParallelState, Topology
from megatron.mpu.staging import PLANNED_GLOO
from megatron.ops.planned import planning_for

META = torch.device("meta")
PLANNED_NCCL = "planned_nccl"

# Every rank has come to each meeting in the store, however many are expected.
_EVERYONE = 1 << 40


class Witness(Protocol):
    """Who is told what a rank puts on the wire."""

    def communicate(
        self, kind: str, group: dist.ProcessGroup, ranks: tuple[int, ...], tensor: Tensor
    ) -> int:
        """Take note of a collective or message of `tensor`; returns its number."""

    def wait(self, number: int) -> None:
        """Take note that what follows needs the result of that number."""


class _Work(dist.Work):
    """A communication that is over; waiting for it is noted once."""

    def __init__(self, witness: Witness | None, number: int) -> None:
        super().__init__()
        self._witness, self._number = witness, number

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._witness is not None:
            self._witness.wait(self._number)
        self._witness = None
        return True

    def is_completed(self) -> bool:
        return True


class PlannedGroup(dist.ProcessGroup):
    """A process group whose other members do not exist.

    PyTorch calls the methods below for the functions of `torch.distributed`; it has renamed two.

    Attributes:
        witness: who is told of what is communicated.
        told: what each member says when they tell one another objects, pickled.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.witness: Witness | None = None
        self.told: list[bytes] = []

    def getBackendName(self) -> str:  # noqa: N802, the name is PyTorch's
        return "planned"

    def allreduce(self, tensors: Any, *_: Any) -> dist.Work:
        return self._done("all-reduce", tensors[0])

    def broadcast(self, tensors: Any, *_: Any) -> dist.Work:
        return self._done("broadcast", tensors[0])

    def all_gather_single(self, output: Tensor, *_: Any) -> dist.Work:
        return self._done("all-gather", output)

    def reduce_scatter_single(self, output: Tensor, source: Tensor, *_: Any) -> dist.Work:
        return self._done("reduce-scatter", source)

    def _allgather_base(self, output: Tensor, *_: Any) -> dist.Work:
        return self._done("all-gather", output)

    def _reduce_scatter_base(self, output: Tensor, source: Tensor, *_: Any) -> dist.Work:
        return self._done("reduce-scatter", source)

    def allgather(self, outputs: Any, inputs: Any, *_: Any) -> dist.Work:
        """An exchange of objects, first of their sizes: the members' are known beforehand."""
        for said, output in zip(self.told, outputs[0], strict=True):
            if output.dtype == torch.int64:
                output.fill_(len(said))
            else:
                output[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        return _Work(None, 0)

    def send(self, tensors: Sequence[Tensor], *_: Any) -> dist.Work:
        return self._done("send", tensors[0])

    def recv(self, tensors: Sequence[Tensor], *_: Any) -> dist.Work:
        return self._done("recv", tensors[0])

    def _done(self, kind: str, tensor: Tensor) -> _Work:
        if self.witness is None:
            return _Work(None, 0)
        ranks = tuple(dist.get_process_group_ranks(self))
        return _Work(self.witness, self.witness.communicate(kind, self, ranks, tensor))


class _Store(dist.Store):
    """Where ranks meet: all of them are there at once."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, Any] = {}

    def set(self, key: str, value: Any) -> None:
        self._values[key] = value

    def get(self, key: str) -> Any:
        return self._values.get(key, b"")

    def add(self, key: str, amount: int) -> int:
        return _EVERYONE

    def wait(self, *_: Any) -> None:
        return None


def _make_group(store: dist.Store, rank: int, size: int, timeout: timedelta) -> PlannedGroup:
    return PlannedGroup(rank, size)


@contextmanager
def one_rank(
    topology: Topology,
    rank: int,
    device_type: str,
    witness: Witness | None = None,
    stages_say: Sequence[object] = (),
) -> Iterator[ParallelState]:
    """Within it this process is `rank` of the grid, with its groups; `witness` sees what it does.

    `stages_say` is what the ranks along the pipeline tell one another, where they do. Tensors on
    the meta device stand for ones on `device_type`: "cuda", where ranks communicate by NCCL, or
    "cpu", by gloo.

    Raises:
        RuntimeError: this process has process groups already.
    """
    if dist.is_initialized():
        raise RuntimeError("a process of a run cannot plan another one")
    with planning_for(device_type):
        if topology.world_size == 1:
            yield ParallelState.single(META)
            return
        before = sys.excepthook
        backend = PLANNED_GLOO if device_type == "cpu" else PLANNED_NCCL
        if not hasattr(dist.Backend, backend.upper()):
            dist.Backend.register_backend(backend, _make_group, devices=["cpu", "cuda"])
        dist.init_process_group(backend, store=_Store(), rank=rank, world_size=topology.world_size)
        try:
            state = ParallelState.create(topology, device=META)
            for group in group_names(state):
                assert isinstance(group, PlannedGroup)
                group.witness = witness
                members = map(topology.coordinates, dist.get_process_group_ranks(group))
                said = (stages_say[place.pipeline] for place in members) if stages_say else ()
                group.told = [pickle.dumps(each) for each in said]
            yield state
        finally:
            dist.destroy_process_group()
            # PyTorch has put the rank in front of all that is to be said of an exception.
            sys.excepthook = before


def group_names(state: ParallelState) -> dict[dist.ProcessGroup, str]:
    """What each process group of a rank is for."""
    names = {
        "tensor": state.tensor,
        "pipeline": state.pipeline,
        "data": state.data,
        "model": state.model,
        "embedding": state.embedding,
        "position-embedding": state.position_embedding,
    }
    found = {
        axis.group: name
        for name, axis in names.items()
        if axis is not None and axis.group is not None
    }
    edges = (*state.forward_edges.values(), *state.backward_edges.values())
    found |= dict.fromkeys(edges, "pipeline")
    if dist.is_initialized():
        assert dist.group.WORLD is not None
        found[dist.group.WORLD] = "world"
    return found
