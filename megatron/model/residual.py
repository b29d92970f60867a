"""What happens on the residual stream, between the split layers: normalisation and dropout.

Every tensor rank holds the stream whole, or with sequence parallelism s/t positions of it. The
parameters here are whole on every rank; where the stream is split, their gradients are terms of a
sum over the tensor ranks.

Letters: s sequence, b micro-batch, h hidden, t tensor size.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron.config import Config
from megatron.model.module import new_parameter, splits_sequence
from megatron.mpu import ParallelState, ShardSpec
from megatron.mpu.init import ones, zeros
from megatron.ops.dropout import dropout
from megatron.ops.norm import layer_norm, rms_norm


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dim, as the configuration says.

    Args:
        on_stream: whether its input is split along the sequence where the residual stream is.
    """

    def __init__(
        self, config: Config, state: ParallelState, name: str, *, on_stream: bool = True
    ) -> None:
        super().__init__()
        shape, partial = (config.model.hidden_size,), on_stream and splits_sequence(config, state)
        self.epsilon = config.model.layernorm_epsilon
        weight = ShardSpec(f"{name}.weight", shape, partial=partial)
        self.weight = new_parameter(config, state, weight, ones)
        self.bias = None
        if config.model.normalization == "LayerNorm":
            bias = ShardSpec(f"{name}.bias", shape, partial=partial)
            self.bias = new_parameter(config, state, bias, zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h] in the parameters' format"""
        if self.bias is None:
            return rms_norm(x, self.weight, self.epsilon)
        return layer_norm(x, self.weight, self.bias, self.epsilon)


class StreamDropout(nn.Module):
    """Dropout of hidden states that lie on the residual stream."""

    def __init__(self, config: Config, state: ParallelState) -> None:
        super().__init__()
        self.probability = config.model.hidden_dropout
        self.streams = state.streams
        self.is_split = splits_sequence(config, state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s or s / t, b, h] -> the same"""
        if not self.training or self.probability == 0.0:
            return x
        if not self.is_split:
            return dropout(x, self.probability)
        # Other positions live on the other tensor ranks: they drop independently.
        with self.streams.split_region():
            return dropout(x, self.probability)
