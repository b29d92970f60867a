"""The transformer: layers of attention and MLP around a residual stream.

Pre-LayerNorm (arXiv 1909.08053, figure 7): the stream itself is never normalised on its way, only
what a block reads from it, and once more behind the last layer. A block begins with a
column-parallel product and ends with a row-parallel one.

Letters: s sequence, z sequence of the encoder, b micro-batch, h hidden, t tensor size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from megatron.config import Config
from megatron.model.attention import ParallelAttention
from megatron.model.enums import LayerType
from megatron.model.mlp import ParallelMLP
from megatron.model.residual import Norm, StreamDropout
from megatron.mpu import ParallelState, recompute
from megatron.ops.attention import AttentionMask
from megatron.ops.rotary import Rotation


@dataclass(frozen=True)
class Context:
    """What all layers of a stack read beside the residual stream.

    Attributes:
        mask: what self-attention may see.
        rotation: rotary positions; None where there are none.
        encoder_output: [z, b, h], what a decoder attends to; z / t with sequence parallelism.
        encoder_mask: which of it is no padding.
    """

    mask: AttentionMask
    rotation: Rotation | None = None
    encoder_output: torch.Tensor | None = None
    encoder_mask: AttentionMask = AttentionMask()  # noqa: RUF009 - it is frozen

    def beside(self, encoder_output: torch.Tensor, mask: AttentionMask) -> Context:
        """This context for a decoder that attends to ``encoder_output``."""
        return replace(self, encoder_output=encoder_output, encoder_mask=mask)

    @property
    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """The tensors that get a gradient."""
        optional = (self.encoder_output, self.mask.bias)
        return tuple(tensor for tensor in optional if tensor is not None)

    def holding(self, *tensors: torch.Tensor) -> Context:
        """This context with other tensors in place of the differentiable ones."""
        rest = list(tensors)
        encoder_output = None if self.encoder_output is None else rest.pop(0)
        bias = None if self.mask.bias is None else rest.pop(0)
        return replace(self, encoder_output=encoder_output, mask=self.mask.with_bias(bias))


class ParallelTransformerLayer(nn.Module):
    """x + attention(norm(x)), in a decoder x + attention(norm(x), encoder), x + mlp(norm(x))."""

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        name: str,
        layer_type: LayerType = LayerType.encoder,
    ) -> None:
        super().__init__()
        self.normalised_residual = config.model.apply_residual_connection_post_layernorm
        self.dropout = StreamDropout(config, state)
        self.input_layernorm = Norm(config, state, f"{name}.input_layernorm")
        self.self_attention = ParallelAttention(config, state, f"{name}.self_attention")
        self.post_attention_layernorm = Norm(config, state, f"{name}.post_attention_layernorm")
        if layer_type is LayerType.decoder:
            self.inter_attention = ParallelAttention(
                config, state, f"{name}.inter_attention", cross=True
            )
            self.post_inter_attention_layernorm = Norm(
                config, state, f"{name}.post_inter_attention_layernorm"
            )
        self.layer_type = layer_type
        self.mlp = ParallelMLP(config, state, f"{name}.mlp")

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """[s, b, h] -> [s, b, h]; s / t positions with sequence parallelism"""
        normalised = self.input_layernorm(x)
        attended = self.self_attention(normalised, context.mask, rotation=context.rotation)
        x = self._residual(x, normalised) + self.dropout(attended)

        normalised = self.post_attention_layernorm(x)
        if self.layer_type is LayerType.decoder:
            attended = self.inter_attention(
                normalised, context.encoder_mask, encoder_output=context.encoder_output
            )
            x = self._residual(x, normalised) + self.dropout(attended)
            normalised = self.post_inter_attention_layernorm(x)

        return self._residual(x, normalised) + self.dropout(self.mlp(normalised))

    def _residual(self, x: torch.Tensor, normalised: torch.Tensor) -> torch.Tensor:
        return normalised.to(x.dtype) if self.normalised_residual else x


class ParallelTransformer(nn.Module):
    """The layers of one stack on one pipeline stage, and behind the last of all a norm.

    Args:
        numbers: the layers' numbers within the stack.
        post_process: whether the stack ends here.
    """

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        numbers: Sequence[int],
        *,
        name: str,
        post_process: bool,
        layer_type: LayerType = LayerType.encoder,
    ) -> None:
        super().__init__()
        self.state = state
        self.layers = nn.ModuleList(
            ParallelTransformerLayer(config, state, f"{name}.layers.{number}", layer_type)
            for number in numbers
        )
        self.final_layernorm = (
            Norm(config, state, f"{name}.final_layernorm") if post_process else None
        )
        self.recomputed = _recomputed_runs(config, len(self.layers))
        self.stores_split = config.parallel.distribute_saved_activations

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """[s, b, h] -> [s, b, h]; s / t positions with sequence parallelism"""
        done = 0
        if self.training:
            for run in self.recomputed:
                x = self._run_recomputed(run, x, context)
                done = run.stop
        for layer in self.layers[done:]:
            x = layer(x, context)
        return x if self.final_layernorm is None else self.final_layernorm(x)

    def _run_recomputed(self, run: range, x: torch.Tensor, context: Context) -> torch.Tensor:
        def part(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            own = context.holding(*tensors)
            for number in run:
                x = self.layers[number](x, own)
            return x

        split_axis = self.state.tensor if self.stores_split else None
        return recompute(
            part,
            x,
            *context.differentiable,
            streams=self.state.streams,
            split_axis=split_axis,
        )


def _recomputed_runs(config: Config, layers: int) -> list[range]:
    """The runs of a stage's layers that are recomputed together; the layers behind them are not."""
    parallel, number = config.parallel, config.parallel.recompute_num_layers
    if parallel.recompute_granularity != "full":
        return []
    if parallel.recompute_method == "block":
        return [range(i, i + 1) for i in range(min(number, layers))]
    return [range(i, min(i + number, layers)) for i in range(0, layers, number)]
