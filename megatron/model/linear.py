"""A linear layer that is not split."""

from __future__ import annotations

import torch
from torch import nn

from megatron.config import Config
from megatron.model.initial import init_methods
from megatron.model.module import new_parameter
from megatron.mpu import ParallelState, ShardSpec
from megatron.mpu.init import zeros
from megatron.mpu.layers import linear


class WholeLinear(nn.Module):
    """x W^T + b that every tensor rank holds and computes whole."""

    def __init__(
        self, config: Config, state: ParallelState, name: str, output_size: int | None = None
    ) -> None:
        super().__init__()
        h = config.model.hidden_size
        out = h if output_size is None else output_size
        init, _ = init_methods(config)
        self.weight = new_parameter(config, state, ShardSpec(f"{name}.weight", (out, h)), init)
        self.bias = new_parameter(config, state, ShardSpec(f"{name}.bias", (out,)), zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., out]"""
        return linear(x, self.weight, self.bias)
