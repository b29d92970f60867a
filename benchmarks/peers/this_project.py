"""This project: a step exactly as the training loop calls it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers.sizes import CLIP, EPSILON, LEARNING_RATE, WEIGHT_DECAY, Sizes
from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.training.gpt import GPTPretraining
from megatron.training.initialize import initialize
from megatron.training.task import Batch
from megatron.training.trainer import Trainer

_NAMES = {
    "language_model.embedding.word_embeddings": "words",
    "language_model.embedding.position_embeddings": "positions",
    "self_attention.query_key_value": "qkv",
    "self_attention.dense": "projection",
    "mlp.dense_h_to_4h": "up",
    "mlp.dense_4h_to_h": "down",
}


def build(sizes: Sizes, layout: str) -> Callable[[], float]:
    """A step of the layout; every process of it must build one."""
    config = configuration(sizes, layout)
    state = initialize(config)
    trainer = Trainer(config, GPTPretraining(config), state)
    _fill(trainer, sizes)
    batches = cycle(
        [
            _micro_batches(tokens.chunk(state.data.size)[state.data.rank], config)
            for tokens in sizes.batches()
        ]
    )

    def step() -> float:
        done = trainer.step(next(batches))
        if state.data.size > 1:
            dist.all_reduce(done.parts)
        return done.parts.item() or float("nan")  # before the last stage there is no loss

    return step


def configuration(sizes: Sizes, layout: str) -> Config:
    """The flags of the layout."""
    parallel = {
        "single": ParallelConfig(use_cpu=True),
        "tp": ParallelConfig(use_cpu=True, tensor_model_parallel_size=2),
        "tp-sp": ParallelConfig(use_cpu=True, tensor_model_parallel_size=2, sequence_parallel=True),
        "pp": ParallelConfig(
            use_cpu=True,
            pipeline_model_parallel_size=2,
            pipeline_layers=sizes.stage_layers,
            pipeline_schedule="zb-h1",
        ),
        "dp": ParallelConfig(use_cpu=True),
    }
    parts = {"pp": sizes.micro_batches, "dp": 2}.get(layout, 1)
    return Config(
        model=ModelConfig(
            model_type="gpt",
            num_layers=sizes.layers,
            hidden_size=sizes.hidden,
            num_attention_heads=sizes.heads,
            max_position_embeddings=sizes.sequence,
            vocab_size=sizes.vocabulary,
            layernorm_epsilon=EPSILON,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        parallel=parallel[layout],
        optimizer=OptimizerConfig(
            lr=LEARNING_RATE,
            lr_decay_style="constant",
            weight_decay=WEIGHT_DECAY,
            clip_grad=CLIP,
        ),
        data=DataConfig(seq_length=sizes.sequence),
        train=TrainConfig(
            micro_batch_size=sizes.batch // parts, global_batch_size=sizes.batch, train_iters=10**6
        ),
    )


def _micro_batches(tokens: Tensor, config: Config) -> list[Batch]:
    return [
        {"tokens": part, "loss_weights": torch.ones(part.size(0), config.data.seq_length)}
        for part in tokens.split(config.train.micro_batch_size)
    ]


@torch.no_grad()
def _fill(trainer: Trainer, sizes: Sizes) -> None:
    axis = trainer.state.tensor
    for key, parameter, _ in trainer.weights:
        module, _, kind = key.rpartition(".")
        for ending, name in _NAMES.items():
            if kind == "weight" and module.endswith(ending):
                number = module.removesuffix(ending).strip(".").rpartition(".")[2]
                full = f"{number}.{name}" if number else name
                parameter.copy_(sizes.part(full, axis.rank, axis.size))
