"""The transformer: layers of attention and MLP around a residual stream.

Pre-LayerNorm (arXiv 1909.08053, figure 7): the stream itself is never normalised on its way, only
what a block reads from it, and once more behind the last layer. A block begins with a
column-parallel product and ends with a row-parallel one.

Letters: s sequence, b micro-batch, h hidden, f MLP width, n heads, d head size, t tensor size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config import Config
from megatron.model.module import new_parameter, parameter_dtype
from megatron.mpu import ColumnParallelLinear, ParallelState, RowParallelLinear, ShardSpec, Stage
from megatron.mpu.init import InitMethod, normal, ones, xavier_uniform, zeros
from megatron.ops.attention import attention


def init_method_normal(sigma: float, seed: int = 1234) -> InitMethod:
    """N(0, sigma**2)."""
    return normal(sigma, seed)


def scaled_init_method_normal(sigma: float, num_layers: int, seed: int = 1234) -> InitMethod:
    """N(0, sigma**2 / (2 * num_layers)), for the products that end in the residual stream.

    The stream adds up two of them per layer; so scaled, their sum keeps the variance of one
    (arXiv 1909.08053, section 4.1).
    """
    return normal(sigma / math.sqrt(2.0 * num_layers), seed)


def init_methods(config: Config) -> tuple[InitMethod, InitMethod]:
    """The initial values of matrices in general, and of those that end in the residual stream."""
    model, seed = config.model, config.train.seed
    if model.init_method_xavier_uniform:
        return xavier_uniform(seed), xavier_uniform(seed)
    std = model.init_method_std
    return (
        init_method_normal(std, seed),
        scaled_init_method_normal(std, model.num_layers, seed),
    )


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last dim, whole on all ranks.

    Source: arXiv 1607.06450.
    """

    def __init__(self, config: Config, state: ParallelState, name: str) -> None:
        super().__init__()
        shape = (config.model.hidden_size,)
        self.epsilon = config.model.layernorm_epsilon
        self.weight = new_parameter(config, state, ShardSpec(f"{name}.weight", shape), ones)
        self.bias = new_parameter(config, state, ShardSpec(f"{name}.bias", shape), zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., h]"""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


def gelu(x: torch.Tensor, config: Config) -> torch.Tensor:
    """x Phi(x) (arXiv 1606.08415), or its tanh form where the configuration says so."""
    return F.gelu(x, approximate="tanh" if config.model.openai_gelu else "none")


class ParallelMLP(nn.Module):
    """h -> f -> h, with the f columns split over the tensor axis."""

    def __init__(self, config: Config, state: ParallelState, name: str) -> None:
        super().__init__()
        self.config = config
        init, scaled_init = init_methods(config)
        dtype = parameter_dtype(config)
        h, f = config.model.hidden_size, config.model.ffn_size
        self.dense_h_to_4h = ColumnParallelLinear(
            h, f, name=f"{name}.dense_h_to_4h", state=state, init_method=init, dtype=dtype
        )
        self.dense_4h_to_h = RowParallelLinear(
            f, h, name=f"{name}.dense_4h_to_h", state=state, init_method=scaled_init, dtype=dtype
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, h] -> [s, b, h]"""
        hidden = gelu(self.dense_h_to_4h(x), self.config)  # [s, b, f / t]
        return self.dense_4h_to_h(hidden)


class ParallelAttention(nn.Module):
    """Self-attention with the heads split over the tensor axis.

    The rows of ``query_key_value`` are ordered [n, 3, d], so that an equal cut of them gives each
    rank whole heads with all three of their projections.
    """

    def __init__(self, config: Config, state: ParallelState, name: str) -> None:
        super().__init__()
        self.state = state
        self.dropout = config.model.attention_dropout
        self.head_size = config.model.head_size
        projection = config.model.num_attention_heads * self.head_size
        init, scaled_init = init_methods(config)
        dtype = parameter_dtype(config)
        h = config.model.hidden_size
        self.query_key_value = ColumnParallelLinear(
            h,
            3 * projection,
            name=f"{name}.query_key_value",
            state=state,
            init_method=init,
            dtype=dtype,
        )
        bias = self.query_key_value.bias
        assert bias is not None
        bias.register_hook(self._without_key_part)
        self.dense = RowParallelLinear(
            projection,
            h,
            name=f"{name}.dense",
            state=state,
            init_method=scaled_init,
            dtype=dtype,
        )

    def _without_key_part(self, bias_gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the bias [3 n d / t] with that of the keys' bias set to zero.

        It adds the same number to all scores of a query, and the softmax does not see that: the
        gradient is zero but for rounding, from which Adam would make full steps at random.
        """
        gradient = bias_gradient.clone()
        gradient.view(-1, 3, self.head_size)[:, 1] = 0.0
        return gradient

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[s, b, h], mask bool [b, 1, 1 or s, s] -> [s, b, h]"""
        mixed = self.query_key_value(x)  # [s, b, 3 n d / t]
        mixed = mixed.view(*mixed.shape[:2], -1, 3, self.head_size)
        query, key, value = mixed.unbind(dim=3)  # [s, b, n / t, d] each
        if self.training and self.dropout > 0.0:
            # Other heads live on the other tensor ranks: their weights drop independently.
            with self.state.streams.split_region():
                context = attention(query, key, value, mask, self.dropout)
        else:
            context = attention(query, key, value, mask, 0.0)
        return self.dense(context)  # [s, b, n d / t] -> [s, b, h]


class ParallelTransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, state: ParallelState, name: str) -> None:
        super().__init__()
        self.dropout = config.model.hidden_dropout
        self.input_layernorm = LayerNorm(config, state, f"{name}.input_layernorm")
        self.self_attention = ParallelAttention(config, state, f"{name}.self_attention")
        self.post_attention_layernorm = LayerNorm(config, state, f"{name}.post_attention_layernorm")
        self.mlp = ParallelMLP(config, state, f"{name}.mlp")

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[s, b, h] -> [s, b, h]"""
        x = x + self._dropped(self.self_attention(self.input_layernorm(x), mask))
        return x + self._dropped(self.mlp(self.post_attention_layernorm(x)))

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training)


class ParallelTransformer(nn.Module):
    """The layers of one pipeline stage, and behind the last of all layers a LayerNorm."""

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        stage: Stage,
        *,
        name: str,
        post_process: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ParallelTransformerLayer(config, state, f"{name}.layers.{number}")
            for number in stage.layers
        )
        self.final_layernorm = (
            LayerNorm(config, state, f"{name}.final_layernorm") if post_process else None
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[s, b, h] -> [s, b, h]"""
        for layer in self.layers:
            x = layer(x, mask)
        return x if self.final_layernorm is None else self.final_layernorm(x)
