"""Plans to show: real schedules with made-up costs and amounts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.mpu.topology import Topology
from megatron.pipeline.schedule import make_schedule
from megatron.pipeline.simulator import Costs, simulate
from megatron.planner.hardware import load_hardware
from megatron.planner.plan import CommunicationTotal, Plan, RankPlan
from tests.configs import small

GIB = 1024**3


def plan(
    name: str = "1f1b",
    ranks: int = 4,
    micro_batches: int = 8,
    virtual: int = 1,
    activations: int = 2 * GIB,
    rest: float = 0.1,
    **flags: Any,
) -> Plan:
    """A GPT of 1.3 B parameters per stage, of 24 where `ranks` is 64, on A100s.

    `activations` are the bytes that a forward pass leaves, `rest` the seconds of a step in which
    the pipeline has ended.
    """
    config = small(
        **{
            "model_type": "gpt", "num_layers": 2 * ranks * virtual, "hidden_size": 25600,
            "num_attention_heads": 160, "max_position_embeddings": 2048, "seq_length": 2048,
            "vocab_size": 51200, "fp16": True, "micro_batch_size": 1,
            "global_batch_size": 6 * micro_batches, "recompute_granularity": "full",
            "tensor_model_parallel_size": 8, "pipeline_model_parallel_size": ranks,
            "num_layers_per_virtual_pipeline_stage": 2 if virtual > 1 else None,
            "pipeline_schedule": name,
        }
        | flags
    )  # fmt: skip
    costs = Costs(0.052 / virtual, 0.07 / virtual, 0.06 / virtual, 0.002)
    schedule = make_schedule(name, ranks, micro_batches, virtual=virtual, costs=costs)
    found = simulate(schedule, costs)
    parameters = 15_730_000_000
    ends = (0, ranks - 1)
    return Plan(
        config=config,
        topology=Topology(6 * 8 * ranks, tensor=8, pipeline=ranks),
        parameters=ranks * parameters,
        schedule=schedule,
        micro_batches=micro_batches,
        ranks=tuple(
            RankPlan(
                rank=rank,
                stages=schedule.stages_of(rank),
                parameters=parameters + (1_310_000_000 if rank in ends else 0),
                weights=2 * (extra := (parameters + (1_310_000_000 if rank in ends else 0)) // 8),
                gradients=4 * extra,
                optimizer=12 * extra,
                activations=int(found.peak_activations[rank] * activations / virtual) + GIB,
                communications=_communications(rank, ranks, micro_batches * virtual),
            )
            for rank in range(ranks)
        ),
        flops=8 * parameters * 2048 * ranks * micro_batches * 6.0,
        model_flops=6 * parameters * 2048 * ranks * micro_batches * 6.0,
        simulation=found,
        step_time=found.cost + rest,
        hardware=replace(load_hardware("a100-80gb"), memory_gib=80, reserved_gib=2),
    )


def _communications(rank: int, ranks: int, calls: int) -> tuple[CommunicationTotal, ...]:
    message = 2048 * 25600 * 2
    neighbours = (rank > 0) + (rank < ranks - 1)
    found = [CommunicationTotal("tensor", "all-reduce", 8, 12 * calls, 12 * calls * message)]
    if neighbours:
        total = neighbours * calls
        found += [
            CommunicationTotal("pipeline", kind, 2, total, total * message)
            for kind in ("send", "recv")
        ]
    if rank in (0, ranks - 1) and ranks > 1:
        found.append(CommunicationTotal("embedding", "all-reduce", 2, 1, 655_360_000))
    return (*found, CommunicationTotal("data", "all-reduce", 6, 30, 7_900_000_000))
