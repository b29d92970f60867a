"""The bytes that a planned layer holds are those of arXiv 2205.05198, table 2, for its models.

The table counts the masks of dropout, a byte for each element, which PyTorch's operators keep. The
kernels of this project draw them again, and hold 2 of a layer's sbh bytes less.

Letters: s sequence, b micro-batch, h hidden, a heads, t tensor size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest

from megatron.mpu import Topology
from megatron.pipeline.actions import Kind
from megatron.planner.recording import plannable, record_ranks
from megatron.training import GPTPretraining
from tests.configs import small

S, T = 2048, 8


class Model(NamedTuple):
    """The letters of the table for one of the paper's models (its table 3)."""

    h: int
    a: int
    b: int


MODELS = {
    "22B": Model(6144, 64, 4),
    "175B": Model(12288, 96, 1),
    "530B": Model(20480, 128, 1),
    "1T": Model(25600, 160, 1),
}
SPLIT = "sequence_parallel"
ROWS: dict[str, tuple[dict[str, object], Callable[[Model], float]]] = {
    # name: flags, bytes / sbh
    "tensor": ({}, lambda m: 10 + 24 / T + 5 * m.a * S / (m.h * T)),
    "tensor and sequence": ({SPLIT: True}, lambda m: (34 + 5 * m.a * S / m.h) / T),
    "tensor, selective": ({"recompute_granularity": "selective"}, lambda m: 10 + 24 / T),
    "tensor and sequence, selective": (
        {SPLIT: True, "recompute_granularity": "selective"},
        lambda m: 34 / T,
    ),
    "full": ({"recompute_granularity": "full"}, lambda m: 2),
}


@cache
def _held(model: Model, layers: int, row: str, kernels: str) -> int:
    """Bytes that a forward pass of so many layers leaves on one of eight tensor ranks."""
    config = small(
        model_type="gpt",
        num_layers=layers,
        hidden_size=model.h,
        num_attention_heads=model.a,
        seq_length=S,
        max_position_embeddings=S,
        micro_batch_size=model.b,
        global_batch_size=3 * model.b,
        vocab_size=51200,
        bf16=True,
        tensor_model_parallel_size=T,
        attention_backend="unfused",
        hidden_dropout=0.1,
        attention_dropout=0.1,
        kernels=kernels,
        **ROWS[row][0],
    )
    (rank,) = record_ranks(plannable(config), GPTPretraining, Topology(T, tensor=T), "cuda")
    return rank.actions[0, Kind.FORWARD, "middle"].change


def _of_a_layer(model: Model, row: str, kernels: str) -> float:
    """Bytes of one layer, in sbh."""
    more, fewer = (_held(model, layers, row, kernels) for layers in (2, 1))
    return (more - fewer) / (S * model.b * model.h)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_holds_what_the_paper_says(name: str, row: str) -> None:
    model, formula = MODELS[name], ROWS[row][1]
    assert _of_a_layer(model, row, "torch") == pytest.approx(formula(model), rel=0.015)


@pytest.mark.parametrize(("row", "spared"), [("tensor", 2), ("tensor and sequence", 2 / T)])
def test_kernels_hold_no_masks(row: str, spared: float) -> None:
    """Not those of a layer's two dropouts, nor the causal one, s x s, that the softmax is given."""
    model = MODELS["22B"]
    held = [_of_a_layer(model, row, kernels) for kernels in ("torch", "auto")]
    causal = S / (model.b * model.h)
    assert held[0] - held[1] == pytest.approx(spared + causal, rel=0.01)
