"""Layouts at random, out of all that `megatron.validation` accepts.

A draw that is impossible is drawn again: what is tested is what a user can ask for.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any

from megatron.validation import validate
from tests.parity.runs import NETWORKS, STEPS, Case

MOST_RANKS, MOST_SAMPLES = 8, 24
GRIDS = [
    (t, p, d) for t, p, d in product(range(1, MOST_RANKS + 1), repeat=3) if t * p * d <= MOST_RANKS
]


def draw_case(draw: random.Random) -> Case:
    """A network, and a layout and options that it can be trained with."""
    network = draw.choice(list(NETWORKS))
    while True:
        tensor, pipeline, data = draw.choice(GRIDS)
        exact = draw.random() < 0.75
        flags: dict[str, Any] = {
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            **_stages(draw, network, pipeline),
            **_batches(draw, data),
            **_memory(draw),
            "sequence_parallel": draw.random() < 0.5,
            "attention_backend": draw.choice(["auto", "unfused"]),
            "attention_softmax_in_fp32": draw.random() < 0.2,
            "clip_grad": draw.choice([0.0, 0.5]),
            "fp64": exact,
            # Adam divides what rounding leaves of a gradient whose terms cancel by its own size.
            "adam_eps": 1e-8 if exact else 1e-6,
            "gradient_bucket_size": draw.choice([2000, 5000, 10**6]),
        }
        case = Case.of(network, tensor * pipeline * data, **flags)
        config = case.config()
        if config.train.global_batch(data) <= MOST_SAMPLES and not validate(config, case.ranks):
            return case


def _stages(draw: random.Random, network: str, pipeline: int) -> dict[str, Any]:
    """Stages, stated layer by layer or in equal shares, and their schedule."""
    schedules = ["gpipe", "1f1b", "zb-h1", "zb-2p"]
    # Twice, since more of what is drawn with it is impossible.
    schedule = draw.choice([*schedules, "interleaved", "interleaved"])
    model = Case.of(network).config().model
    flags: dict[str, Any] = {"pipeline_schedule": schedule}
    if schedule == "zb-2p":
        flags["pipeline_costs"] = draw.choice([None, (1.0, 1.0, 1.0, 0.0), (1.0, 1.5, 0.5, 0.3)])
    if model.model_type == "t5":
        split = draw.choice([None, *range(1, pipeline)])
        flags["pipeline_model_parallel_split_rank"] = split
        if pipeline > 1 and draw.random() < 0.7:
            encoders = split or pipeline // 2
            flags["pipeline_layers"] = (
                *_cut(draw, model.num_layers, encoders),
                *_cut(draw, model.decoder_layers, pipeline - encoders),
            )
        return flags
    virtual = draw.choice([2, 3]) if schedule == "interleaved" else 1
    if draw.random() < 0.7:
        flags["pipeline_layers"] = _cut(draw, model.num_layers, pipeline * virtual)
    elif schedule == "interleaved":
        flags["num_layers_per_virtual_pipeline_stage"] = 1
    return flags


def _cut(draw: random.Random, layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, any or none."""
    cuts = sorted(draw.randint(0, layers) for _ in range(stages - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, layers], strict=True))


def _batches(draw: random.Random, data: int) -> dict[str, Any]:
    """Micro-batches, more or fewer than stages, of steps that stay or grow."""
    micro, number = draw.randint(1, 4), draw.randint(1, 8)
    unit = micro * data
    flags: dict[str, Any] = {"micro_batch_size": micro, "global_batch_size": unit * number}
    if draw.random() < 0.25 and number > 1:
        start = draw.randint(1, number - 1)
        increment = draw.choice([n for n in range(1, number) if (number - start) % n == 0])
        samples = unit * number * draw.randint(1, STEPS // 2)
        flags |= {
            "rampup_batch_size": (unit * start, unit * increment, samples),
            "train_iters": None,
            "lr_warmup_iters": 0,
            "train_samples": unit * number * STEPS,
            "lr_warmup_samples": unit * number,
        }
    return flags


def _memory(draw: random.Random) -> dict[str, Any]:
    """What is kept, what is shared out and what is computed again."""
    flags: dict[str, Any] = {
        "use_distributed_optimizer": draw.random() < 0.5,
        "shard_gradients": draw.random() < 0.3,
        "recompute_granularity": draw.choice([None, "selective", "full"]),
    }
    if flags["recompute_granularity"] == "full":
        flags |= {
            "recompute_method": draw.choice(["uniform", "block"]),
            "recompute_num_layers": draw.randint(1, 3),
            "distribute_saved_activations": draw.random() < 0.5,
        }
    return flags
