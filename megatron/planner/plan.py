"""What a dry run finds out: the figures of a step on every rank of a pipeline.

This file imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config import Config
from megatron.mpu.topology import Topology
from megatron.pipeline.actions import Schedule
from megatron.pipeline.simulator import Simulation
from megatron.planner.hardware import Hardware


@dataclass(frozen=True)
class CommunicationTotal:
    """What one rank communicates in a step, in one way over one group.

    Attributes:
        group: tensor, pipeline, data, model, embedding, position-embedding or world.
        kind: all-reduce, all-gather, reduce-scatter, broadcast, send or recv.
        ranks: size of the group; 2 for a message.
        count: calls.
        bytes: of all calls together: what an all-reduce, a reduce-scatter and a send are given,
            what an all-gather results in.
    """

    group: str
    kind: str
    ranks: int
    count: int
    bytes: int


@dataclass(frozen=True)
class RankPlan:
    """One rank of the pipeline; all tensor and data ranks of it are alike.

    Attributes:
        rank: its place along the pipeline.
        stages: numbers of its stages, virtual ones included.
        parameters: of these stages, over all tensor ranks, without copies and padding.
        weights, gradients, optimizer: bytes, as they are allocated.
        activations: bytes of everything else at the step's peak.
        communications: of a step.
    """

    rank: int
    stages: tuple[int, ...]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    communications: tuple[CommunicationTotal, ...]


@dataclass(frozen=True)
class Plan:
    """What a configuration costs on a cluster.

    Attributes:
        parameters: of the whole model, without copies and padding.
        micro_batches: of a step on one data-parallel rank.
        ranks: one for each rank of the pipeline.
        flops: operations of the matrix products of a step over all ranks, as they are executed:
            recomputation counts, causal attention counts in full.
        model_flops: those that the mathematics asks for (`megatron.training.flops`).
        simulation: of the schedule, in seconds.
        step_time: seconds of a step.
    """

    config: Config
    topology: Topology
    parameters: int
    schedule: Schedule
    micro_batches: int
    ranks: tuple[RankPlan, ...]
    flops: float
    model_flops: float
    simulation: Simulation
    step_time: float
    hardware: Hardware

    @property
    def bubble(self) -> float:
        """Share of the schedule's time in which a rank, on average, waits for others."""
        return self.simulation.bubble

    @property
    def tflops_per_gpu(self) -> float:
        """Model operations per second of one GPU, in 10^12."""
        return self.model_flops / self.step_time / self.topology.world_size / 1e12

    @property
    def mfu(self) -> float:
        """Share of the GPU's peak rate that model operations reach (arXiv 2204.02311)."""
        peak = self.hardware.peak_flops(self.config.model.dtype)
        return self.tflops_per_gpu * 1e12 / peak
