"""What a dry run says is what real ranks then hold and send.

Small networks are planned for as many CPUs as they are then trained on: some that are stated, and
some drawn at random. `tests/planner/full.py` draws as many as one likes.
"""

from __future__ import annotations

import random
import secrets
from typing import Any

import pytest

from tests.parity.runs import Case
from tests.planner.drawn import draw_planned
from tests.planner.observed import compare

LARGE = {
    "hidden_size": 64,
    "seq_length": 48,
    "max_position_embeddings": 48,
    "micro_batch_size": 2,
    "fp64": False,
    "vocab_size": 211,
    "gradient_bucket_size": 40_000,
}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one process": ("gpt", 1, {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "tensor, sequence, data": (
        "gpt",
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "hidden_dropout": 0.1},
    ),
    "pipeline, sharded optimizer": (
        "gpt",
        4,
        {
            "pipeline_model_parallel_size": 2,
            "use_distributed_optimizer": True,
            "pipeline_layers": (3, 2),
        },
    ),
    "interleaved": (
        "gpt",
        4,
        {
            "pipeline_model_parallel_size": 2,
            "tensor_model_parallel_size": 2,
            "num_layers": 4,
            "num_layers_per_virtual_pipeline_stage": 1,
        },
    ),
    "bert, selective": (
        "bert",
        4,
        {
            "num_layers": 4,
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "recompute_granularity": "selective",
            "attention_dropout": 0.1,
        },
    ),
    "t5": ("t5", 4, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "llama, sharded gradients": (
        "llama",
        4,
        {
            "tensor_model_parallel_size": 2,
            "use_distributed_optimizer": True,
            "shard_gradients": True,
        },
    ),
    "zero bubble, recomputed, half": (
        "gpt",
        4,
        {
            "pipeline_model_parallel_size": 4,
            "num_layers": 8,
            "pipeline_schedule": "zb-h1",
            "recompute_granularity": "full",
            "bf16": True,
        },
    ),
}
MICRO_BATCHES = 6
DRAWN, MOST_RANKS = 2, 3


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_plan_is_what_ranks_hold_and_send(name: str) -> None:
    network, ranks, flags = LAYOUTS[name]
    case = Case.of(network, ranks, **LARGE | flags)
    size = MICRO_BATCHES * LARGE["micro_batch_size"] * case.data_size
    assert not compare(case.with_flags(global_batch_size=size)).wrong


def test_a_plan_of_any_layout_is_what_ranks_hold_and_send() -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(DRAWN):
        case = draw_planned(draw, MOST_RANKS)
        print(case)
        assert not compare(case).wrong
