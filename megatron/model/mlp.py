"""The MLP of a layer.

Letters: s sequence, b micro-batch, h hidden, f MLP width, t tensor size.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron.config import Config
from megatron.model.initial import init_methods
from megatron.model.module import parameter_dtype
from megatron.mpu import ColumnParallelLinear, ParallelState, RowParallelLinear
from megatron.mpu.fp8 import Fp8Recipe
from megatron.ops import kernels
from megatron.ops.activation import activated
from megatron.ops.mlp import KINDS, bias_activation


class ParallelMLP(nn.Module):
    """h -> f -> h, with the f columns split over the tensor axis.

    A gated MLP (arXiv 2002.05202) has two projections to f, the gate's and the one it multiplies,
    as two blocks of one matrix.
    """

    def __init__(self, config: Config, state: ParallelState, name: str) -> None:
        super().__init__()
        self.is_gated = config.model.is_gated
        self.kind = "silu" if config.model.swiglu else config.model.activation
        init, scaled_init = init_methods(config)
        h, f = config.model.hidden_size, config.model.ffn_size
        blocks = (f, f) if self.is_gated else (f,)
        bias = not config.model.disable_bias_linear
        dtype, split = parameter_dtype(config), config.parallel.sequence_parallel
        fp8 = Fp8Recipe.of(config.model)
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
            fp8=fp8,
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
            fp8=fp8,
        )

    def forward(self, x: torch.Tensor, *, add_bias: bool = True) -> torch.Tensor:
        """[s, b, h] -> [s, b, h]; s / t positions with sequence parallelism.

        Without ``add_bias`` the bias of ``dense_4h_to_h`` is left to the caller.
        """
        return self.dense_4h_to_h(self._widen(x), add_bias=add_bias)

    @property
    def output_bias(self) -> torch.Tensor | None:
        """The bias of the last product, [h]."""
        return self.dense_4h_to_h.bias

    def _widen(self, x: torch.Tensor) -> torch.Tensor:
        """The first product and the activation: [s, b, h] -> [s, b, f / t]"""
        first = self.dense_h_to_4h
        if kernels.active(x) and self.kind in KINDS:
            product = first(x, add_bias=False)
            return bias_activation(product, first.bias, self.kind, gated=self.is_gated)
        return activated(first(x), self.kind, gated=self.is_gated)
