"""This rank's process groups and random streams.

:class:`ParallelState` turns the arithmetic of :class:`~megatron.mpu.topology.Topology` into
process groups and is passed explicitly to whatever communicates. One process needs no process
group at all: :meth:`ParallelState.single` has axes of size 1, over which every collective does
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from types import MappingProxyType

import torch
import torch.distributed as dist

from megatron.mpu.random import RandomStreams
from megatron.mpu.topology import Coordinates, Groups, Topology

Edge = tuple[int, int]
DEFAULT_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Axis:
    """One axis of the grid as seen from this rank.

    ``ranks`` are global ranks in the axis' order, ``rank`` is this rank's place among them.
    ``group`` is None exactly where the axis has size 1, since nothing is ever communicated there.
    """

    ranks: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of ranks on the axis."""
        return len(self.ranks)


@dataclass(frozen=True)
class ParallelState:
    """The axes and the dropout streams of this rank.

    ``embedding`` and ``position_embedding`` are None on ranks that hold no such parameter.

    ``forward_edges`` and ``backward_edges`` hold, for every pipeline edge that touches this rank,
    keyed by (sender, receiver), a communicator of its own. All that passes over it passes in one
    direction and stays in order, so that no pair of ranks can wait for each other crosswise.
    """

    topology: Topology
    rank: int
    device: torch.device
    tensor: Axis
    pipeline: Axis
    data: Axis
    model: Axis
    embedding: Axis | None
    position_embedding: Axis | None
    forward_edges: Mapping[Edge, dist.ProcessGroup] = field(default_factory=dict)
    backward_edges: Mapping[Edge, dist.ProcessGroup] = field(default_factory=dict)
    streams: RandomStreams = field(init=False, compare=False)

    def __post_init__(self) -> None:
        streams = RandomStreams(self.coordinates, self.tensor.size, self.device)
        object.__setattr__(self, "streams", streams)

    @property
    def world_size(self) -> int:
        """Number of processes of the whole run."""
        return self.topology.world_size

    @property
    def coordinates(self) -> Coordinates:
        """This rank's place on the grid."""
        return self.topology.coordinates(self.rank)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelState:
        """The state of a run of one process, without any process group."""
        alone = Axis((0,), 0)
        return cls(
            topology=Topology(1),
            rank=0,
            device=torch.device(device),
            tensor=alone,
            pipeline=alone,
            data=alone,
            model=alone,
            embedding=alone,
            position_embedding=alone,
        )

    @classmethod
    def create(
        cls,
        topology: Topology,
        *,
        device: torch.device | str = "cpu",
        backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> ParallelState:
        """Create this rank's groups; every rank of the world must call it.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: its world size is not the topology's.
        """
        if topology.world_size == 1:
            return cls.single(device)
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed must be initialised before the parallel state")
        if dist.get_world_size() != topology.world_size:
            raise ValueError(
                f"the topology is for {topology.world_size} ranks, "
                f"torch.distributed has {dist.get_world_size()}"
            )
        maker = _GroupMaker(dist.get_rank(), backend, timeout)
        pipelines = topology.pipeline_groups()
        return cls(
            topology=topology,
            rank=maker.rank,
            device=torch.device(device),
            tensor=maker.axis(topology.tensor_groups()),
            pipeline=maker.axis(pipelines),
            data=maker.axis(topology.data_groups()),
            model=maker.axis(topology.model_groups()),
            forward_edges=maker.edges(pipelines, forward=True),
            backward_edges=maker.edges(pipelines, forward=False),
            embedding=maker.partial_axis(topology.embedding_groups()),
            position_embedding=maker.partial_axis(topology.position_embedding_groups()),
        )

    def destroy(self) -> None:
        """Release the process groups of this state.

        torch.distributed must be initialised anew before another state is created: the names of
        the new groups would be found taken in its store.
        """
        axes = (self.tensor, self.pipeline, self.data, self.model)
        groups = [axis.group for axis in (*axes, self.embedding, self.position_embedding) if axis]
        edges = {*self.forward_edges.values(), *self.backward_edges.values()}
        for group in (*groups, *edges):
            if group is not None:
                dist.destroy_process_group(group)


@dataclass(frozen=True)
class _GroupMaker:
    """Creates process groups in an order that all their members agree on."""

    rank: int
    backend: str | None
    timeout: timedelta

    def axis(self, groups: Groups) -> Axis:
        """The axis of a kind of groups that partitions the world."""
        mine = next(ranks for ranks in groups if self.rank in ranks)
        return Axis(mine, mine.index(self.rank), self._group(mine))

    def partial_axis(self, groups: Groups) -> Axis | None:
        """The axis of a kind of equally large groups that leaves some ranks out; None on those.

        A rank that is left out makes a group of itself, so that all have made equally many.
        """
        mine = next((ranks for ranks in groups if self.rank in ranks), None)
        alone = all(len(ranks) == 1 for ranks in groups)
        group = None if alone else self._new_group(mine or (self.rank,))
        return None if mine is None else Axis(mine, mine.index(self.rank), group)

    def edges(self, pipelines: Groups, *, forward: bool) -> Mapping[Edge, dist.ProcessGroup]:
        """The edges of this rank's pipeline in one direction, each on a communicator of its own.

        They are made in three rounds, edges that begin at an even place, at an odd one, and the
        edge that closes the ring, which virtual stages use. No rank has two edges in a round, and
        one that has none makes a group of itself, so that all have made equally many.
        """
        mine = next(ranks for ranks in pipelines if self.rank in ranks)
        if len(mine) == 1:
            return MappingProxyType({})
        open_edges = tuple(pairwise(mine))
        made = {}
        for edges in (open_edges[::2], open_edges[1::2], ((mine[-1], mine[0]),)):
            pair = next((pair for pair in edges if self.rank in pair), (self.rank,))
            group = self._new_group(pair)
            if len(pair) == 2:
                made[pair if forward else (pair[1], pair[0])] = group
        return MappingProxyType(made)

    def _group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        return None if len(ranks) == 1 else self._new_group(ranks)

    def _new_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        # Where only members take part, the number of groups that a rank helps to make stays
        # constant however large the world is. PyTorch names such a group after how many groups a
        # process has made before, which must be equal on all its members.
        group = dist.new_group(
            sorted(ranks),
            backend=self.backend,
            timeout=self.timeout,
            use_local_synchronization=True,
        )
        assert group is not None
        return group
