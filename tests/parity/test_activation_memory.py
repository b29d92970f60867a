"""The bytes that autograd holds for a layer are those of arXiv 2205.05198, table 2.

Two models that differ by one layer are run forward on real tensor ranks; what the larger one holds
more is the layer's. The formulas count two bytes for an activation and one for a dropout mask, and
leave out what is small beside them, such as the statistics of a norm.

Letters: s sequence, b micro-batch, h hidden, a heads, t tensor size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from megatron.config import Config
from megatron.model import build_gpt
from megatron.mpu import ParallelState, Topology
from megatron.mpu.stage import stages
from tests.configs import small
from tests.distributed import run_distributed

VOCABULARY = 64


class Shape(NamedTuple):
    """The letters of the formulas."""

    s: int
    b: int
    h: int
    a: int


SHAPES = [Shape(64, 4, 128, 4), Shape(128, 1, 64, 8), Shape(32, 8, 256, 8)]


def _config(shape: Shape, **changes: Any) -> Config:
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 8,
        "hidden_size": shape.h,
        "num_attention_heads": shape.a,
        "max_position_embeddings": shape.s,
        "seq_length": shape.s,
        "micro_batch_size": shape.b,
        "bf16": True,
        "attention_backend": "unfused",
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    }
    return small(**options | changes)


def _bytes_held(model: torch.nn.Module, run: Callable[[], torch.Tensor]) -> int:
    """Bytes of the distinct storages that the graph of ``run`` holds, apart from parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, tuple[torch.Tensor, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # A node that held its own output would never be freed, and with it the process groups.
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # The tensor is kept, so that no other one gets its memory and is taken for it.
            held[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(size for _, size in held.values())


def _held_by_layer(shape: Shape, tensor: int, changes: dict[str, Any]) -> int:
    state = ParallelState.create(Topology(tensor, tensor=tensor))
    tokens = torch.zeros(shape.b, shape.s, dtype=torch.int64)

    def held(layers: int) -> int:
        config = _config(shape, num_layers=layers, tensor_model_parallel_size=tensor, **changes)
        model = build_gpt(config, state, stages([layers])[0]).train()
        state.streams.start(seed=1, step=1, micro_batch=0)
        return _bytes_held(model, lambda: model(tokens, labels=tokens))

    return held(3) - held(2)


def _of_a_layer(shape: Shape, tensor: int, changes: dict[str, Any]) -> list[int]:
    """What each tensor rank holds of a layer."""
    if tensor == 1:
        return [_held_by_layer(shape, tensor, changes)]
    return run_distributed(tensor, _held_by_layer, shape, tensor, changes)


FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective"}
SPLIT = {"sequence_parallel": True}
# PyTorch's fused attention on a CPU has no dropout.
FUSED = {"attention_backend": "auto", "attention_dropout": 0.0}

Formula = Callable[[Shape, int], float]
TABLE: dict[str, tuple[dict[str, Any], tuple[int, ...], Formula]] = {
    # name: flags, tensor sizes, bytes / sbh
    "none": ({}, (1,), lambda m, t: 34 + 5 * m.a * m.s / m.h),
    "tensor": ({}, (2, 4), lambda m, t: 10 + 24 / t + 5 * m.a * m.s / (m.h * t)),
    "tensor and sequence": (SPLIT, (2, 4), lambda m, t: (34 + 5 * m.a * m.s / m.h) / t),
    "selective": (SELECTIVE, (1,), lambda m, t: 34),
    "tensor, selective": (SELECTIVE, (2, 4), lambda m, t: 10 + 24 / t),
    "tensor and sequence, selective": (SPLIT | SELECTIVE, (2, 4), lambda m, t: 34 / t),
    "full": (FULL, (1, 2), lambda m, t: 2),
    "full, tensor and sequence": (FULL | SPLIT, (2, 4), lambda m, t: 2 / t),
    "full, stored split": (
        FULL | {"distribute_saved_activations": True},
        (2, 4),
        lambda m, t: 2 / t,
    ),
    "fused": (FUSED, (1,), lambda m, t: 34),
    "fused, tensor": (FUSED, (2, 4), lambda m, t: 10 + 24 / t),
    "fused, tensor and sequence": (FUSED | SPLIT, (2, 4), lambda m, t: 34 / t),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "tensor"), [(kind, t) for kind, (_, sizes, _) in TABLE.items() for t in sizes]
)
def test_a_layer_holds_what_the_formula_says(kind: str, tensor: int, shape: Shape) -> None:
    changes, _, formula = TABLE[kind]
    unit = shape.s * shape.b * shape.h
    for held in _of_a_layer(shape, tensor, changes):
        assert held / unit == pytest.approx(formula(shape, tensor), rel=0.1)
