"""What a plan says: the figures and lines that its text and its picture share, and its JSON.

This file imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from megatron.planner.plan import Plan, RankPlan

# What a rank's memory is made of: names of a RankPlan's fields, in bytes.
MEMORY = ("weights", "gradients", "optimizer", "activations")
WIDTH = 100  # columns of a terminal, which texts are made for
TERA, SECONDS_PER_DAY = 1e12, 86400


class Unit(NamedTuple):
    """A unit that amounts are written in."""

    name: str
    size: float


MEMORY_UNITS = (Unit("GiB", 2**30), Unit("MiB", 2**20), Unit("KiB", 2**10))
FLOP_UNITS = tuple(
    Unit(f"{p}FLOP", 10.0**e) for p, e in zip("ZEPTG", (21, 18, 15, 12, 9), strict=True)
)
COUNT_UNITS = (Unit("B", 1e9), Unit("M", 1e6), Unit("K", 1e3))


def unit_for(largest: float, units: Sequence[Unit]) -> Unit:
    """The largest unit that does not exceed `largest`; the smallest where none does."""
    return next((unit for unit in units if largest >= unit.size), units[-1])


def in_units(amount: float, units: Sequence[Unit], digits: int = 2) -> str:
    """An amount in the unit that fits it."""
    unit = unit_for(amount, units)
    return f"{amount / unit.size:,.{digits}f} {unit.name}"


# The figures that text, JSON and picture share.


def peak_bytes(rank: RankPlan) -> int:
    """The most bytes that a rank holds at once."""
    return rank.weights + rank.gradients + rank.optimizer + rank.activations


def usable_bytes(plan: Plan) -> int:
    """Bytes of a GPU that tensors can have."""
    return plan.hardware.memory - plan.hardware.reserved


def virtual_stages(plan: Plan) -> int:
    """Stages that each rank of the pipeline holds."""
    return plan.schedule.num_stages // plan.schedule.num_ranks


def fits(plan: Plan) -> bool:
    """Whether every rank fits its GPU."""
    return all(peak_bytes(rank) <= usable_bytes(plan) for rank in plan.ranks)


def batch_size(plan: Plan) -> int:
    """Samples of a step."""
    return plan.config.train.micro_batch_size * plan.micro_batches * plan.topology.data


def tokens_per_step(plan: Plan) -> int:
    """Tokens of a step, padding included; of an encoder-decoder, of both sequences."""
    data = plan.config.data
    has_target = plan.config.model.model_type == "t5"
    return batch_size(plan) * (data.seq_length + (data.decoder_length if has_target else 0))


def steps_of_run(plan: Plan) -> int | None:
    """Whole steps of the run, as if its batch were full from the start; None where not stated."""
    train = plan.config.train
    if train.train_samples is not None:
        return train.train_samples // batch_size(plan)
    return train.train_iters


def executed_tflops(plan: Plan) -> float:
    """Operations per second of one GPU, recomputation included, in 10^12."""
    return plan.flops / plan.step_time / plan.topology.world_size / TERA


def rank_word(plan: Plan) -> str:
    """What a rank is: a GPU, or with --use-cpu a process."""
    return "process" if plan.config.parallel.use_cpu else "GPU"


# The head lines, which are also those of the picture.


def model_line(plan: Plan) -> str:
    """The model with its size."""
    model, data = plan.config.model, plan.config.data
    layers, length = str(model.num_layers), str(data.seq_length)
    if model.model_type == "t5":
        layers, length = f"{layers} + {model.decoder_layers}", f"{length} + {data.decoder_length}"
    return (
        f"{model.model_type.upper()}, {in_units(plan.parameters, COUNT_UNITS, 1)} parameters: "
        f"{layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads, "
        f"sequence {length}, vocabulary {model.vocab_size}"
    )


def layout_line(plan: Plan) -> str:
    """The cluster and how the model is spread over it."""
    topology, hardware = plan.topology, plan.hardware
    nodes = math.ceil(topology.world_size / hardware.gpus_per_node)
    chunks = virtual_stages(plan)
    virtual = f" x virtual {chunks}" if chunks > 1 else ""
    on_cpu = "CPU as if it were " if plan.config.parallel.use_cpu else ""
    return (
        f"{topology.world_size} x {on_cpu}{hardware.name}, {nodes} node{'s' * (nodes > 1)}: "
        f"tensor {topology.tensor} x pipeline {topology.pipeline}{virtual} x data {topology.data}"
    )


def batch_line(plan: Plan) -> str:
    """The batch, the schedule, and the switches that change what a step costs."""
    parallel, train = plan.config.parallel, plan.config.train
    switches = {
        plan.config.model.dtype: True,
        f"{parallel.recompute_granularity} recomputation": parallel.recompute_granularity,
        "sequence parallel": parallel.sequence_parallel,
        "distributed optimizer": parallel.use_distributed_optimizer,
        "sharded gradients": parallel.shard_gradients,
    }
    passes = f"{plan.micro_batches} micro-batch{'es' * (plan.micro_batches > 1)}"
    return (
        f"batch {batch_size(plan)} = data {plan.topology.data} x {passes} "
        f"of {train.micro_batch_size}; {parallel.schedule} schedule; "
        + ", ".join(name for name, is_on in switches.items() if is_on)
    )


def result_line(plan: Plan) -> str:
    """What a step costs, and whether it fits."""
    rate = f"{plan.tflops_per_gpu:,.1f} TFLOP/s per {rank_word(plan)}"
    return (
        f"step {seconds_text(plan.step_time)}, bubble {100 * plan.bubble:.1f} %, "
        f"{rate}, MFU {100 * plan.mfu:.1f} %; {fit_line(plan)}"
    )


def fit_line(plan: Plan) -> str:
    """Whether the fullest rank fits, and what is left or missing."""
    fullest = max(plan.ranks, key=peak_bytes)
    needed, usable = peak_bytes(fullest), usable_bytes(plan)
    unit = unit_for(needed, MEMORY_UNITS)
    verdict, left = ("fits", "left") if needed <= usable else ("does not fit", "too much")
    return (
        f"{verdict}: rank {fullest.rank} needs {needed / unit.size:,.2f} of "
        f"{usable / unit.size:,.2f} {unit.name}, {abs(usable - needed) / unit.size:,.2f} {left}"
    )


def seconds_text(seconds: float) -> str:
    """A time with its unit."""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:,.2f} ms"


# The JSON.


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as texts, finite numbers, lists and None; a number's unit ends its key's name.

    Operations are counted as `_flops`, rates in `_tflops_per_second`, shares from 0 to 1, and what
    has no unit is a count. The keys:

        model          type, layers, decoder_layers (None but for T5), hidden_size, attention_heads,
                       sequence_length, decoder_sequence_length, vocab_size, dtype, parameters
        cluster        hardware, gpus, gpus_per_node, memory_bytes, reserved_bytes (of them, for
                       CUDA, NCCL and fragmentation), peak_tflops_per_second (of a GPU, in dtype)
        layout         tensor, pipeline, virtual, data, schedule, micro_batches, micro_batch_size,
                       global_batch_size, sequence_parallel, distributed_optimizer,
                       recompute_granularity
        fits           whether every rank does
        ranks          a list, one entry per pipeline rank: rank, stages, parameters, weights_bytes,
                       gradients_bytes, optimizer_bytes, activations_bytes, peak_bytes, fits,
                       communications: a list of group, kind, ranks, count, bytes
        step           seconds, pipeline_seconds (of them, the schedule's), bubble, tokens,
                       tokens_per_second, model_flops, executed_flops (with recomputation),
                       model_tflops_per_second_per_gpu, executed_tflops_per_second_per_gpu, mfu
        run            steps, seconds, days; None where the run's length is not stated
        config         every flag, by section, as `Config.to_dict`; the schedule follows from it

    `ranks` of a communication are the size of its group, its bytes those of all calls together.
    With --use-cpu, which `config` has, times, shares and limits are still those of the hardware.
    """
    return {
        "model": _model_json(plan),
        "cluster": _cluster_json(plan),
        "layout": _layout_json(plan),
        "fits": fits(plan),
        "ranks": [_rank_json(rank, usable_bytes(plan)) for rank in plan.ranks],
        "step": _step_json(plan),
        "run": _run_json(plan),
        "config": plan.config.to_dict(),
    }


def _model_json(plan: Plan) -> dict[str, Any]:
    model, data = plan.config.model, plan.config.data
    is_t5 = model.model_type == "t5"
    return {
        "type": model.model_type,
        "layers": model.num_layers,
        "decoder_layers": model.decoder_layers if is_t5 else None,
        "hidden_size": model.hidden_size,
        "attention_heads": model.num_attention_heads,
        "sequence_length": data.seq_length,
        "decoder_sequence_length": data.decoder_length if is_t5 else None,
        "vocab_size": model.vocab_size,
        "dtype": model.dtype,
        "parameters": plan.parameters,
    }


def _cluster_json(plan: Plan) -> dict[str, Any]:
    hardware = plan.hardware
    return {
        "hardware": hardware.name,
        "gpus": plan.topology.world_size,
        "gpus_per_node": hardware.gpus_per_node,
        "memory_bytes": hardware.memory,
        "reserved_bytes": hardware.reserved,
        "peak_tflops_per_second": hardware.peak_flops(plan.config.model.dtype) / TERA,
    }


def _layout_json(plan: Plan) -> dict[str, Any]:
    parallel = plan.config.parallel
    return {
        "tensor": plan.topology.tensor,
        "pipeline": plan.topology.pipeline,
        "virtual": virtual_stages(plan),
        "data": plan.topology.data,
        "schedule": parallel.schedule,
        "micro_batches": plan.micro_batches,
        "micro_batch_size": plan.config.train.micro_batch_size,
        "global_batch_size": batch_size(plan),
        "sequence_parallel": parallel.sequence_parallel,
        "distributed_optimizer": parallel.use_distributed_optimizer,
        "recompute_granularity": parallel.recompute_granularity,
    }


def _rank_json(rank: RankPlan, usable: int) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "stages": list(rank.stages),
        "parameters": rank.parameters,
        **{f"{name}_bytes": getattr(rank, name) for name in MEMORY},
        "peak_bytes": peak_bytes(rank),
        "fits": peak_bytes(rank) <= usable,
        "communications": [asdict(total) for total in rank.communications],
    }


def _step_json(plan: Plan) -> dict[str, Any]:
    tokens = tokens_per_step(plan)
    return {
        "seconds": plan.step_time,
        "pipeline_seconds": plan.simulation.cost,
        "bubble": plan.bubble,
        "tokens": tokens,
        "tokens_per_second": tokens / plan.step_time,
        "model_flops": plan.model_flops,
        "executed_flops": plan.flops,
        "model_tflops_per_second_per_gpu": plan.tflops_per_gpu,
        "executed_tflops_per_second_per_gpu": executed_tflops(plan),
        "mfu": plan.mfu,
    }


def _run_json(plan: Plan) -> dict[str, Any] | None:
    steps = steps_of_run(plan)
    if steps is None:
        return None
    seconds = steps * plan.step_time
    return {"steps": steps, "seconds": seconds, "days": seconds / SECONDS_PER_DAY}
