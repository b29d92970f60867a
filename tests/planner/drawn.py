"""Layouts at random to plan and to run: those of the parity tests, of larger and more models."""

from __future__ import annotations

import random
from typing import Any

from megatron.errors import ConfigError
from megatron.validation import validate
from tests.parity.layouts import draw_case
from tests.parity.runs import Case


def draw_planned(draw: random.Random, most_ranks: int = 8) -> Case:
    """A network and a layout, with activations that are larger than scalars and paddings."""
    while True:
        case = draw_case(draw)
        if case.ranks > most_ranks:
            continue
        larger = case.with_flags(**_sizes(draw, case), **_training(draw, case))
        try:
            problems = validate(larger.config(), larger.ranks)
        except ConfigError:
            continue
        if not problems:
            return larger


def _sizes(draw: random.Random, case: Case) -> dict[str, Any]:
    model = case.config().model
    length = draw.choice([24, 48, 72, 96])
    sizes = {
        "hidden_size": model.hidden_size * draw.choice([2, 3] if model.hidden_size < 48 else [2]),
        "seq_length": length,
        "max_position_embeddings": length,
        "vocab_size": draw.choice([101, 211, 520]),
        "gradient_bucket_size": draw.choice([1, 3000, 20_000, 200_000, 10**8]),
    }
    if model.model_type == "t5":
        target = draw.choice([length // 2, length, 2 * length])
        sizes |= {"decoder_seq_length": target, "max_position_embeddings": max(length, target)}
    return sizes


def _training(draw: random.Random, case: Case) -> dict[str, Any]:
    precision = draw.choice(["fp64", "fp32", "fp32", "bf16", "fp16"])
    dropout = draw.choice([0.0, 0.1])
    flags: dict[str, Any] = {
        "fp64": precision == "fp64",
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "fp32_residual_connection": (
            precision in ("bf16", "fp16")
            and case.config().model.norm_position == "pre"
            and draw.random() < 0.3
        ),
        "loss_scale": draw.choice([None, None, 128.0]),
        "hidden_dropout": dropout,
        "attention_dropout": draw.choice([0.0, dropout]),
        "optimizer": draw.choice(["adam", "adam", "sgd"]),
        "sgd_momentum": draw.choice([0.0, 0.9]),
        "cross_entropy_chunk": draw.choice([None, None, 7, 64, 4096]),
    }
    for name in ("untie_embeddings_and_output_weights", "disable_bias_linear"):
        if draw.random() < 0.3:
            flags[name] = True
    if case.config().parallel.schedule == "zb-2p":
        # Without them a run plans by what it has measured.
        flags["pipeline_costs"] = draw.choice([(1.0, 1.0, 1.0, 0.0), (1.0, 1.5, 0.5, 0.3)])
    return flags
