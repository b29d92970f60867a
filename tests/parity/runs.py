"""Short trainings of a small BERT on any layout, reported as whole tensors by global name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.mpu import ParallelState, ShardSpec, Topology
from megatron.training.bert import BertPretraining
from megatron.training.task import Batch
from megatron.training.trainer import Trainer
from tests.distributed import run_distributed

SEQUENCE, MASKED = 12, 3
STEPS = 10


@dataclass(frozen=True)
class Case:
    """A model, a batch and the layout to train them on.

    The vocabulary is divisible by no tensor size, the layers by no number of stages.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    micro_batch: int = 2
    global_batch: int = 8
    layers: tuple[int, ...] = (5,)
    precision: str = "fp64"
    schedule: str = "1f1b"
    seed: int = 1234

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data

    def config(self) -> Config:
        """The run's configuration."""
        return Config(
            model=ModelConfig(
                num_layers=sum(self.layers),
                hidden_size=32,
                num_attention_heads=4,
                max_position_embeddings=SEQUENCE,
                vocab_size=101,
                make_vocab_size_divisible_by=8,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                fp64=self.precision == "fp64",
            ),
            parallel=ParallelConfig(
                use_cpu=True,
                tensor_model_parallel_size=self.tensor,
                pipeline_model_parallel_size=self.pipeline,
                pipeline_layers=self.layers,
                pipeline_schedule=self.schedule,
                gradient_bucket_size=3000,
            ),
            # The norm of the gradient is above 1 at first: clipping is at work.
            optimizer=OptimizerConfig(lr=1e-3, lr_warmup_iters=3, lr_decay_iters=STEPS),
            data=DataConfig(seq_length=SEQUENCE),
            train=TrainConfig(
                micro_batch_size=self.micro_batch,
                global_batch_size=self.global_batch,
                train_iters=STEPS,
                seed=self.seed,
            ),
        )


@dataclass(frozen=True)
class Result:
    """What a training came to: loss parts by step, gradient norms by step, final weights."""

    losses: torch.Tensor
    norms: torch.Tensor
    weights: dict[str, torch.Tensor]


def samples(count: int, seed: int) -> list[Batch]:
    """Single samples of different lengths, with 0 to MASKED masked tokens each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    return [
        {
            # Not 0: transformers gives the padding token's row no gradient.
            "input_ids": 1 + draw(100, SEQUENCE),
            "tokentype_ids": draw(2, SEQUENCE),
            "attention_mask": torch.arange(SEQUENCE) <= draw(SEQUENCE, 1),
            "masked_positions": draw(SEQUENCE, MASKED),
            "masked_labels": draw(101, MASKED),
            "masked_weights": (torch.arange(MASKED) < draw(MASKED + 1, 1)).float(),
            "is_random": draw(2, 1)[0],
        }
        for _ in range(count)
    ]


def own_batches(case: Case, step: int, data_rank: int) -> list[Batch]:
    """The micro-batches of one data-parallel rank in one step."""
    whole = samples(case.global_batch, seed=1000 * case.seed + step)
    share = case.global_batch // case.data
    mine = whole[data_rank * share : (data_rank + 1) * share]
    groups = [mine[i : i + case.micro_batch] for i in range(0, share, case.micro_batch)]
    return [{k: torch.stack([one[k] for one in group]) for k in group[0]} for group in groups]


def train(case: Case) -> Result:
    """Train on the case's layout; in this process where it is a single rank."""
    if case.world_size == 1:
        ranks = [_train_rank(case)]
    else:
        ranks = run_distributed(case.world_size, _train_rank, case)
    losses, norms, _ = ranks[0]
    for other_losses, other_norms, _ in ranks[1:]:
        assert torch.equal(losses, other_losses) and torch.equal(norms, other_norms)
    return Result(losses, norms, _assemble([pieces for _, _, pieces in ranks]))


Piece = tuple[ShardSpec, int, torch.Tensor]


def _train_rank(case: Case) -> tuple[torch.Tensor, torch.Tensor, list[Piece]]:
    torch.set_num_threads(1)
    config = case.config()
    topology = Topology(case.world_size, case.tensor, case.pipeline)
    state = ParallelState.create(topology)
    trainer = Trainer(config, BertPretraining(config), state)
    losses, norms = [], []
    for number in range(STEPS):
        step = trainer.step(own_batches(case, number, state.data.rank))
        losses.append(trainer.over_ranks(step.parts))
        norms.append(step.grad_norm)
    pieces = [
        (spec, state.tensor.rank, tensor.detach().clone()) for _, tensor, spec in trainer.weights
    ]
    if dist.is_initialized():
        state.destroy()
    return torch.stack(losses), torch.stack(norms), pieces


def _assemble(ranks: list[list[Piece]]) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' pieces; copies of the same numbers must be bitwise equal."""
    tensor_size = 1 + max(rank for pieces in ranks for _, rank, _ in pieces)
    whole: dict[str, torch.Tensor] = {}
    for spec, rank, local in (piece for pieces in ranks for piece in pieces):
        target = whole.setdefault(spec.key, torch.full(spec.shape, float("nan"), dtype=local.dtype))
        for box in spec.rectangles(rank, tensor_size):
            held, mine = target[box.global_slices], local[box.local_slices]
            assert bool((held.isnan() | (held == mine)).all()), f"{spec.name}: unequal copies"
            target[box.global_slices] = mine
    missing = [name for name, tensor in whole.items() if tensor.isnan().any()]
    assert not missing, f"no rank holds all of {missing}"
    return whole


def largest_difference(found: Result, expected: Result) -> tuple[float, str]:
    """The largest relative difference and where it is; a tensor's is that of its norm."""
    assert found.weights.keys() == expected.weights.keys()
    pairs: dict[str, tuple[Any, Any]] = {
        "losses": (found.losses, expected.losses),
        "gradient norms": (found.norms, expected.norms),
    }
    elementwise = {name: ((a - b).abs() / b.abs()).max().item() for name, (a, b) in pairs.items()}
    tensors = {
        name: ((found.weights[name] - weight).norm() / weight.norm()).item()
        for name, weight in expected.weights.items()
    }
    differences = elementwise | tensors
    worst = max(differences, key=lambda name: differences[name])
    return differences[worst], worst
