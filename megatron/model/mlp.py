"""The MLP of a layer.

Letters: s sequence, b micro-batch, h hidden, f MLP width, t tensor size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config import Config
from megatron.model.initial import init_methods
from megatron.model.module import parameter_dtype
from megatron.mpu import ColumnParallelLinear, ParallelState, RowParallelLinear
from megatron.ops.activation import ACTIVATIONS


class ParallelMLP(nn.Module):
    """h -> f -> h, with the f columns split over the tensor axis.

    A gated MLP (arXiv 2002.05202) has two projections to f, the gate's and the one it multiplies,
    as two blocks of one matrix.
    """

    def __init__(self, config: Config, state: ParallelState, name: str) -> None:
        super().__init__()
        self.is_gated = config.model.is_gated
        self.activation = F.silu if config.model.swiglu else ACTIVATIONS[config.model.activation]
        init, scaled_init = init_methods(config)
        h, f = config.model.hidden_size, config.model.ffn_size
        blocks = (f, f) if self.is_gated else (f,)
        bias = not config.model.disable_bias_linear
        dtype, split = parameter_dtype(config), config.parallel.sequence_parallel
        self.dense_h_to_4h = ColumnParallelLinear(
            h,
            sum(blocks),
            name=f"{name}.dense_h_to_4h",
            state=state,
            init_method=init,
            dtype=dtype,
            bias=bias,
            blocks=blocks,
            sequence_parallel=split,
        )
        self.dense_4h_to_h = RowParallelLinear(
            f,
            h,
            name=f"{name}.dense_4h_to_h",
            state=state,
            init_method=scaled_init,
            dtype=dtype,
            bias=bias,
            sequence_parallel=split,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, h] -> [s, b, h]; s / t positions with sequence parallelism"""
        return self.dense_4h_to_h(self._activate(self.dense_h_to_4h(x)))

    def _activate(self, hidden: torch.Tensor) -> torch.Tensor:
        """[s, b, f / t], or [s, b, 2 f / t] where it is gated -> [s, b, f / t]"""
        if not self.is_gated:
            return self.activation(hidden)
        gate, linear = hidden.chunk(2, dim=-1)
        return self.activation(gate) * linear
