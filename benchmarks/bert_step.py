"""One training step of BERT on one process, beside `transformers` on the same batch.

Each round times a step of this project, a step of ``MegatronBertForPreTraining`` with PyTorch's
fused AdamW, and a product of two 2048 x 2048 matrices, one after the other: what disturbs the
machine disturbs all three alike, and the ratio of a round is free of it. Both models have the
same size, see the same batches, clip their gradients and apply one update per step; both use the
same number of threads of one process.

The limit of a step is the rate of the matrix product: floating-point operations that the model
cannot do without (megatron.training.flops), over the seconds that they would take at that rate.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.random_batches import random_batches
from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.mpu import ParallelState
from megatron.training.bert import BertPretraining
from megatron.training.task import Batch
from megatron.training.trainer import Trainer

MATRIX = 2048
LEARNING_RATE = 1e-4


def configuration(args: argparse.Namespace) -> Config:
    """This project's configuration of the step."""
    return Config(
        model=ModelConfig(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            max_position_embeddings=args.seq_length,
            vocab_size=args.vocab_size,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        parallel=ParallelConfig(use_cpu=True),
        optimizer=OptimizerConfig(lr=LEARNING_RATE, lr_decay_style="constant"),
        data=DataConfig(seq_length=args.seq_length),
        train=TrainConfig(
            micro_batch_size=args.batch_size // args.micro_batches,
            global_batch_size=args.batch_size,
            train_iters=10**6,
        ),
    )


def our_step(config: Config, batches: list[Batch]) -> Callable[[], Any]:
    """A step of this project, exactly as the training loop calls it."""
    trainer = Trainer(config, BertPretraining(config), ParallelState.single())
    return lambda: trainer.step(batches)


def their_step(config: Config, batches: list[Batch]) -> Callable[[], Any]:
    """A step of the same model of `transformers` in the usual loop."""
    from transformers import MegatronBertConfig, MegatronBertForPreTraining

    network = config.model
    assert network.vocab_size is not None
    model = MegatronBertForPreTraining(
        MegatronBertConfig(
            vocab_size=network.vocab_size,
            hidden_size=network.hidden_size,
            num_hidden_layers=network.num_layers,
            num_attention_heads=network.num_attention_heads,
            intermediate_size=network.ffn_size,
            max_position_embeddings=network.max_position_embeddings,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    inputs = [_their_inputs(batch) for batch in batches]

    def step() -> None:
        for fields in inputs:
            (model(**fields).loss / len(inputs)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _their_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    labels = torch.full_like(batch["input_ids"], -100)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"].long(),
        "token_type_ids": batch["tokentype_ids"],
        "labels": labels.scatter(1, batch["masked_positions"], batch["masked_labels"]),
        "next_sentence_label": batch["is_random"],
    }


def seconds(action: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in track(range(rounds + 2), description="measuring", transient=True):
        for name, step in steps.items():
            taken = seconds(step)
            if number >= 2:
                times[name].append(taken)
    return times


def figures(config: Config, times: dict[str, list[float]]) -> dict[str, Any]:
    """What the measurement says: medians, and medians of the ratios within a round."""
    global_batch = config.train.global_batch_size or 0
    flops = BertPretraining(config).flops_per_sample(config) * global_batch
    matmul_flops = 2.0 * MATRIX**3

    def share(name: str) -> float:
        pairs = zip(times["matmul"], times[name], strict=True)
        return statistics.median(flops / step * (mm / matmul_flops) for mm, step in pairs)

    ratios = [a / b for a, b in zip(times["megatron"], times["transformers"], strict=True)]
    return {
        "median_seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratio_to_transformers": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "share_of_matmul_rate": {name: share(name) for name in ("megatron", "transformers")},
        "matmul_gflops": matmul_flops / statistics.median(times["matmul"]) / 1e9,
        "tokens_per_second": global_batch
        * config.data.seq_length
        / statistics.median(times["megatron"]),
        "rounds": len(ratios),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print the figures as a table."""
    table = Table("", "seconds a step", "share of the matmul rate")
    for name in ("megatron", "transformers"):
        median, share = result["median_seconds"][name], result["share_of_matmul_rate"][name]
        table.add_row(name, f"{median:.3f}", f"{share:.0%}")
    console.print(table)
    low, high = result["ratio_range"]
    console.print(
        f"ratio {result['ratio_to_transformers']:.3f} (median of {result['rounds']} rounds, "
        f"{low:.3f} to {high:.3f}), matmul {result['matmul_gflops']:.0f} GFLOP/s, "
        f"{result['threads']} threads, {result['tokens_per_second']:.0f} tokens/s"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure and print; the figures."""
    torch.set_num_threads(args.threads)
    config = configuration(args)
    batches = random_batches(config, args.micro_batches)
    left, right = torch.randn(2, MATRIX, MATRIX).unbind()
    steps = {
        "megatron": our_step(config, batches),
        "transformers": their_step(config, batches),
        "matmul": lambda: left @ right,
    }
    result = figures(config, measure(steps, args.rounds))
    show(result, console)
    return result
