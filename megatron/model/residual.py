"""What happens on the residual stream, between the split layers: normalisation and dropout.

A block's output comes onto the stream as residual + dropout(output + bias), and mostly a norm of
the sum follows. Where a kernel takes the tensors both are one pass over them, and the bias is left
to it by the layer that has it.

Every tensor rank holds the stream whole, or with sequence parallelism s/t positions of it. The
parameters here are whole on every rank; where the stream is split, their gradients are terms of a
sum over the tensor ranks.

Letters: s sequence, b micro-batch, h hidden, t tensor size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from megatron.config import Config
from megatron.model.module import new_parameter, splits_sequence
from megatron.mpu import ParallelState, ShardSpec
from megatron.mpu.init import ones, zeros
from megatron.ops import kernels
from megatron.ops.dropout import bias_dropout_add, dropout, dropout_add
from megatron.ops.fused_norm import norm_after_add
from megatron.ops.norm import layer_norm, rms_norm
from megatron.ops.philox import Draw


class StreamDropout(nn.Module):
    """Dropout of hidden states that lie on the residual stream, or come onto it."""

    def __init__(self, config: Config, state: ParallelState) -> None:
        super().__init__()
        self.probability = config.model.hidden_dropout
        self.streams = state.streams
        self.is_split = splits_sequence(config, state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s or s / t, b, h] -> the same"""
        if self.own_probability == 0.0:
            return x
        if kernels.active(x):
            return bias_dropout_add(
                x, None, None, probability=self.own_probability, draw=self.draw()
            )
        with self._stream():
            return dropout(x, self.probability)

    def add(
        self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> torch.Tensor:
        """residual + dropout(x + bias), [s or s / t, b, h] in the format of the residual."""
        if kernels.active(x):
            return bias_dropout_add(
                x, bias, residual, probability=self.own_probability, draw=self.draw()
            )
        with self._stream():
            return dropout_add(x if bias is None else x + bias, residual, self.own_probability)

    @property
    def own_probability(self) -> float:
        """That with which an element is dropped: none in evaluation."""
        return self.probability if self.training else 0.0

    def draw(self) -> Draw | None:
        """Where the next numbers of this rank's part of the stream come from; None for none."""
        if self.own_probability == 0.0:
            return None
        with self._stream():
            return self.streams.draw()

    def _stream(self) -> AbstractContextManager[None]:
        """Where the sequence is split other ranks hold other positions: they drop independently."""
        draws_apart = self.is_split and self.own_probability > 0.0
        return self.streams.split_region() if draws_apart else nullcontext()


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

    def after_add(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        dropout: StreamDropout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream that a block's output x, less its bias, has come onto, and the norm of it.

        [..., h] twice, [h] -> residual + dropout(x + bias) in the format of the residual, and its
        norm in the parameters'.
        """
        if kernels.active(x) and kernels.active(residual):
            return norm_after_add(
                x,
                bias,
                residual,
                self.weight,
                self.bias,
                self.epsilon,
                probability=dropout.own_probability,
                draw=dropout.draw(),
            )
        total = dropout.add(x, bias, residual)
        return total, self(total)
