"""Training runs whose speed was published, as configurations of this project.

    arXiv 2104.04473  table 1: GPT on up to 3072 A100, TFLOP/s per GPU, recomputation counted
    arXiv 2205.05198  table 5: seconds of a step on A100, with full recomputation and with sequence
                      parallelism and recomputation of the attention core
    Megatron-Core     README of the project: GPT on up to 6144 H100, TFLOP/s per GPU

What a source does not state is set by a rule that stands beside it. How the published systems
differed from this project's runtime stands in `System`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.config import Config


@dataclass(frozen=True)
class System:
    """What a published system did otherwise than this project's runtime.

    Where there is no sequence parallelism, all scatter a pipeline's messages over the tensor ranks
    (arXiv 2104.04473, section 4.1).

    Attributes:
        waits_for_tensor_ranks: no collective over the tensor ranks runs beside a product.
        accumulates_apart: a weight's gradient is a tensor in half precision, and adding it to the
            sum is a pass of its own.
        sums_behind_pipeline: with a pipeline, gradients are summed over the data ranks when the
            last backward pass has ended, and not beside it.
        decomposes_products: a product that a collective leads to or follows is cut into one for
            each tensor rank, and all but one piece of the collective run beside them.
    """

    waits_for_tensor_ranks: bool = False
    accumulates_apart: bool = False
    sums_behind_pipeline: bool = False
    decomposes_products: bool = False


@dataclass(frozen=True)
class Run:
    """One published figure.

    Attributes:
        table: where it stands.
        name: of the configuration: its parameters, with tied embeddings.
        published: seconds of a step, or TFLOP/s per GPU.
        gpus: of the whole run.
    """

    table: str
    name: str
    published: float
    gpus: int
    hardware: str
    system: System
    config: Config


NARAYANAN, KORTHIKANTI, CORE = "arXiv 2104.04473", "arXiv 2205.05198", "Megatron-Core"

# Asynchronous all-reduces beside weight gradients, and products that add to the sum of gradients,
# came to Megatron-LM after the first paper; its own data-parallel class, which pipelines needed,
# summed at the end. The last has --tp-comm-overlap.
SYSTEMS = {
    NARAYANAN: System(
        waits_for_tensor_ranks=True, accumulates_apart=True, sums_behind_pipeline=True
    ),
    KORTHIKANTI: System(),
    CORE: System(decomposes_products=True),
}


class Sizes(NamedTuple):
    """A model and its layout."""

    hidden: int
    layers: int
    heads: int
    tensor: int
    pipeline: int
    virtual: int
    micro_batch: int
    batch: int


# Micro-batches and virtual stages are not in the table: they are those of the script that the
# authors have published for it, examples/sc21/run_table_1.sh of Megatron-LM.
_NARAYANAN = (
    ("1.7B", Sizes(2304, 24, 24, 1, 1, 1, 16, 512), 32, 137),
    ("3.6B", Sizes(3072, 30, 32, 2, 1, 1, 16, 512), 64, 138),
    ("7.5B", Sizes(4096, 36, 32, 4, 1, 1, 16, 512), 128, 142),
    ("18.4B", Sizes(6144, 40, 48, 8, 1, 1, 8, 1024), 256, 135),
    ("39.1B", Sizes(8192, 48, 64, 8, 2, 12, 4, 1536), 512, 138),
    ("76.1B", Sizes(10240, 60, 80, 8, 4, 3, 2, 1792), 1024, 140),
    ("145.6B", Sizes(12288, 80, 96, 8, 8, 2, 2, 2304), 1536, 148),
    ("310.1B", Sizes(16384, 96, 128, 8, 16, 2, 1, 2160), 1920, 155),
    ("529.6B", Sizes(20480, 105, 128, 8, 35, 3, 1, 2520), 2520, 163),
    ("1008B", Sizes(25600, 128, 160, 8, 64, 1, 1, 3072), 3072, 163),
)
# Micro-batches are those of table 3. The two figures are with full recomputation, and with sequence
# parallelism and selective recomputation.
_KORTHIKANTI = (
    ("22B", Sizes(6144, 48, 64, 8, 1, 1, 4, 4), 8, (1.42, 1.10)),
    ("175B", Sizes(12288, 96, 96, 8, 8, 3, 1, 64), 64, (18.13, 13.75)),
    ("530B", Sizes(20480, 105, 128, 8, 35, 3, 1, 280), 280, (49.05, 37.83)),
    ("1T", Sizes(25600, 128, 160, 8, 64, 1, 1, 512), 512, (94.42, 71.49)),
)
# Micro-batches and virtual stages are not stated. Here a rank without a pipeline takes its four
# sequences at once, which fit, one with a pipeline one by one; it then has as many virtual stages,
# up to 8, as divide its layers.
_CORE = (
    ("1.5B", Sizes(2048, 24, 16, 1, 1, 1, 4, 192), 408.8),
    ("6.6B", Sizes(4096, 30, 32, 2, 1, 1, 4, 192), 465.9),
    ("15.3B", Sizes(6144, 32, 48, 4, 1, 1, 4, 192), 489.1),
    ("30.5B", Sizes(7168, 48, 56, 8, 1, 1, 4, 192), 459.6),
    ("68.7B", Sizes(8192, 84, 64, 8, 2, 7, 1, 384), 419.7),
    ("117B", Sizes(10240, 92, 80, 8, 4, 1, 1, 768), 420.5),
    ("175.6B", Sizes(12288, 96, 96, 8, 6, 8, 1, 1152), 432.8),
    ("311B", Sizes(16384, 96, 128, 8, 8, 6, 1, 1536), 474.4),
    ("459B", Sizes(18432, 112, 144, 8, 16, 7, 1, 3072), 459.9),
)
_CORE_DATA_RANKS = 48

# Half precision, dropout, and attention from products of its own, as in both papers.
_A100: dict[str, Any] = {
    "seq_length": 2048,
    "vocab_size": 51200,
    "fp16": True,
    "attention_backend": "unfused",
}
_FULL: dict[str, Any] = {"recompute_granularity": "full"}
_SELECTIVE: dict[str, Any] = {"recompute_granularity": "selective", "sequence_parallel": True}
_H100: dict[str, Any] = {
    "seq_length": 4096,
    "vocab_size": 131072,
    "bf16": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "use_distributed_optimizer": True,
}


def published_runs() -> Iterator[Run]:
    """All of them, table by table."""
    for name, sizes, gpus, figure in _NARAYANAN:
        config = _config(sizes, **_A100, **_FULL)
        yield Run(NARAYANAN, name, figure, gpus, "a100-80gb", SYSTEMS[NARAYANAN], config)
    for name, sizes, gpus, (full, selective) in _KORTHIKANTI:
        for which, options, seconds in (
            ("full", _FULL, full),
            ("selective", _SELECTIVE, selective),
        ):
            config, title = _config(sizes, **_A100, **options), f"{name} {which}"
            yield Run(KORTHIKANTI, title, seconds, gpus, "a100-80gb", SYSTEMS[KORTHIKANTI], config)
    for name, sizes, achieved in _CORE:
        config = _config(sizes, **_H100, sequence_parallel=sizes.tensor > 1)
        gpus = sizes.tensor * sizes.pipeline * _CORE_DATA_RANKS
        yield Run(CORE, name, achieved, gpus, "h100-sxm", SYSTEMS[CORE], config)


def _config(sizes: Sizes, **options: Any) -> Config:
    if sizes.virtual > 1:
        each = sizes.layers // sizes.pipeline // sizes.virtual
        options["num_layers_per_virtual_pipeline_stage"] = each
    return Config.from_flags(
        {
            "model_type": "gpt",
            "hidden_size": sizes.hidden,
            "num_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "max_position_embeddings": options["seq_length"],
            "tensor_model_parallel_size": sizes.tensor,
            "pipeline_model_parallel_size": sizes.pipeline,
            "micro_batch_size": sizes.micro_batch,
            "global_batch_size": sizes.batch,
            "train_iters": 1,
            "lr": 1e-4,
            **options,
        }
    )
