"""A small network with every kind of parameter, and plain per-parameter training of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.mpu.collectives import gather_from_tensor_region
from megatron.mpu.init import create_parameter, normal, ones, zeros
from megatron.mpu.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    parallel_lm_logits,
)
from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.shard_spec import ShardSpec
from megatron.optimizer import GradientBuffers

VOCABULARY = 30
HIDDEN = 8
SEED = 7


def make_config(
    *,
    fp16: bool = False,
    bf16: bool = False,
    bucket_size: int = 40_000_000,
    distributed: bool = False,
    shard_gradients: bool = False,
    **optimizer: Any,
) -> Config:
    """A configuration whose optimizer section is ``optimizer`` over the defaults."""
    return Config(
        model=ModelConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=1,
            max_position_embeddings=8,
            fp16=fp16,
            bf16=bf16,
        ),
        parallel=ParallelConfig(
            gradient_bucket_size=bucket_size,
            use_distributed_optimizer=distributed,
            shard_gradients=shard_gradients,
        ),
        optimizer=OptimizerConfig(**{"lr": 0.01, **optimizer}),
        data=DataConfig(seq_length=8),
        train=TrainConfig(micro_batch_size=1, train_iters=10),
    )


class Net(nn.Module):
    """Tokens [b, s] -> logits [b, s, v], through an MLP between tied embeddings."""

    def __init__(self, state: ParallelState, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = normal(0.2, SEED)
        common: dict[str, Any] = {"state": state, "init_method": draw, "dtype": dtype}
        self.embedding = VocabParallelEmbedding(VOCABULARY, HIDDEN, name="embedding", **common)
        self.wide = ColumnParallelLinear(HIDDEN, 4 * HIDDEN, name="wide", **common)
        self.narrow = RowParallelLinear(4 * HIDDEN, HIDDEN, name="narrow", **common)
        self.norm_weight = plain_parameter("norm.weight", (HIDDEN,), state, dtype, ones)
        self.norm_bias = plain_parameter("norm.bias", (HIDDEN,), state, dtype, zeros)
        self.axis = state.tensor

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.narrow(F.gelu(self.wide(x)))
        x = F.layer_norm(x, (HIDDEN,), self.norm_weight, self.norm_bias)
        logits = parallel_lm_logits(x, self.embedding.weight, self.axis, None)
        return gather_from_tensor_region(logits, self.axis)


def plain_parameter(
    name: str, shape: tuple[int, ...], state: ParallelState, dtype: torch.dtype, method: Any
) -> nn.Parameter:
    """A parameter that every rank holds whole."""
    return create_parameter(
        ShardSpec(name, shape), state.tensor, method, dtype=dtype, device=state.device
    )


def micro_batches(count: int, step: int) -> list[Tensor]:
    """Tokens i64[4, 9] for each micro-batch of a step; the last is the next position's label."""
    generator = torch.Generator().manual_seed(1000 + step)
    return list(torch.randint(VOCABULARY, (count, 4, 9), generator=generator))


def loss_of(net: nn.Module, tokens: Tensor, num_micro_batches: int) -> Tensor:
    """This micro-batch's part of the mean loss over the global batch."""
    logits = net(tokens[:, :-1])
    labels = tokens[:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1).double(), labels) / num_micro_batches


def accumulate_gradients(
    gradients: GradientBuffers,
    net: nn.Module,
    own: Sequence[Tensor],
    num_micro_batches: int,
    scale: Tensor | float = 1.0,
) -> None:
    """The gradients of one step, as the training loop makes them; ``own`` is this rank's share."""
    gradients.zero()
    for index, tokens in enumerate(own):
        loss = loss_of(net, tokens, num_micro_batches) * scale
        if index == len(own) - 1:
            gradients.on_last_backward(0)
        loss.backward()
    gradients.finish()


class PlainTraining:
    """The same training by torch's own optimizer and clipping, parameter by parameter."""

    def __init__(self, net: nn.Module, optimizer: type[torch.optim.Optimizer], **options: Any):
        self.net = copy.deepcopy(net)
        decay = options.pop("weight_decay")
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in self.parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = optimizer(groups, foreach=False, **options)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.net.parameters())

    def step(self, batches: Sequence[Tensor], lr: float, clip: float) -> Tensor:
        self.optimizer.zero_grad()
        for tokens in batches:
            loss_of(self.net, tokens, len(batches)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return norm
