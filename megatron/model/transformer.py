"""The transformer: layers of attention and MLP around a residual stream.

Pre-LayerNorm (arXiv 1909.08053, figure 7): the stream itself is never normalised on its way, only
what a block reads from it, and once more behind the last layer. With `--norm-position post`, as in
the original BERT, the sum that a block makes is normalised instead. A block begins with a
column-parallel product and ends with a row-parallel one.

Letters: s sequence, z sequence of the encoder, b micro-batch, h hidden, t tensor size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from megatron.config import Config
from megatron.model.attention import ParallelAttention
from megatron.model.enums import LayerType
from megatron.model.mlp import ParallelMLP
from megatron.model.probe import Extras, Probe
from megatron.model.residual import Norm, StreamDropout
from megatron.monitor import annotated
from megatron.mpu import ParallelState, recompute
from megatron.ops import kernels
from megatron.ops.attention import AttentionMask
from megatron.ops.rotary import Rotation

# [s, b, h] of a block, and the bias [h] that is still to be added to it, if any.
Output = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Context:
    """What all layers of a stack read beside the residual stream.

    Attributes:
        mask: what self-attention may see.
        rotation: rotary positions; None where there are none.
        encoder_output: [z, b, h], what a decoder attends to; z / t with sequence parallelism.
        encoder_mask: which of it is no padding.
        extras: what else concerns the layers; None in training.
    """

    mask: AttentionMask
    rotation: Rotation | None = None
    encoder_output: torch.Tensor | None = None
    encoder_mask: AttentionMask = AttentionMask()  # noqa: RUF009 - it is frozen
    extras: Extras | None = None

    def beside(self, encoder_output: torch.Tensor, mask: AttentionMask) -> Context:
        """This context for a decoder that attends to ``encoder_output``."""
        return replace(self, encoder_output=encoder_output, encoder_mask=mask)

    def with_extras(self, extras: Extras) -> Context:
        """This context with what a caller gives beside, an encoder's output included."""
        own = replace(self, extras=extras)
        if extras.encoder_output is None:
            return own
        return own.beside(extras.encoder_output, extras.encoder_mask)

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
    """Self-attention, in a decoder attention to the encoder's output, and MLP on a residual stream.

    With norms in front, x + block(norm(x)) for each block. With norms behind (arXiv 1706.03762),
    norm(x + block(x)).

    Args:
        cross_distances: whether a decoder's cross attention, too, has vectors for distances.
    """

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        name: str,
        layer_type: LayerType = LayerType.encoder,
        *,
        cross_distances: bool = False,
    ) -> None:
        super().__init__()
        self.norm_behind = config.model.norm_position == "post"
        self.normalised_residual = config.model.apply_residual_connection_post_layernorm
        self.dropout = StreamDropout(config, state)

        def norm(place: str) -> Norm:
            return Norm(config, state, f"{name}.{place}")

        if not self.norm_behind:
            self.input_layernorm = norm("input_layernorm")
        self.self_attention = ParallelAttention(config, state, f"{name}.self_attention")
        self.post_attention_layernorm = norm("post_attention_layernorm")
        if layer_type is LayerType.decoder:
            self.inter_attention = ParallelAttention(
                config,
                state,
                f"{name}.inter_attention",
                cross=True,
                distances=cross_distances,
            )
            self.post_inter_attention_layernorm = norm("post_inter_attention_layernorm")
        self.layer_type = layer_type
        self.mlp = ParallelMLP(config, state, f"{name}.mlp")
        if self.norm_behind:
            self.output_layernorm = norm("output_layernorm")

    def forward(
        self,
        x: torch.Tensor,
        context: Context,
        probes: tuple[Probe | None, Probe | None] = (None, None),
    ) -> torch.Tensor:
        """[s, b, h] -> [s, b, h]; s / t positions with sequence parallelism"""
        if self.norm_behind:
            return self._with_norms_behind(x, context, *probes)
        own, across = probes
        normalised = self.input_layernorm(x)
        attended = self._attend(normalised, context, own)
        residual = self._residual(x, normalised)
        x, normalised = self.post_attention_layernorm.after_add(*attended, residual, self.dropout)

        if self.layer_type is LayerType.decoder:
            if context.encoder_output is not None:
                attended = self._attend_across(normalised, context, across)
                residual = self._residual(x, normalised)
                norm = self.post_inter_attention_layernorm
                x, normalised = norm.after_add(*attended, residual, self.dropout)
            else:
                normalised = self.post_inter_attention_layernorm(x)

        return self.dropout.add(*self._expand(normalised), self._residual(x, normalised))

    def _with_norms_behind(
        self, x: torch.Tensor, context: Context, own: Probe | None, across: Probe | None
    ) -> torch.Tensor:
        attended = self._attend(x, context, own)
        _, x = self.post_attention_layernorm.after_add(*attended, x, self.dropout)
        if self.layer_type is LayerType.decoder and context.encoder_output is not None:
            attended = self._attend_across(x, context, across)
            _, x = self.post_inter_attention_layernorm.after_add(*attended, x, self.dropout)
        return self.output_layernorm.after_add(*self._expand(x), x, self.dropout)[1]

    def _attend(self, x: torch.Tensor, context: Context, probe: Probe | None) -> Output:
        attention = self.self_attention
        return _output(attention, x, context.mask, rotation=context.rotation, probe=probe)

    def _attend_across(self, x: torch.Tensor, context: Context, probe: Probe | None) -> Output:
        encoder, mask = context.encoder_output, context.encoder_mask
        return _output(self.inter_attention, x, mask, encoder_output=encoder, probe=probe)

    def _expand(self, x: torch.Tensor) -> Output:
        return _output(self.mlp, x)

    def _residual(self, x: torch.Tensor, normalised: torch.Tensor) -> torch.Tensor:
        return normalised.to(x.dtype) if self.normalised_residual else x


def _output(
    block: ParallelAttention | ParallelMLP, x: torch.Tensor, *arguments: Any, **named: Any
) -> Output:
    """What a block makes of x; less its bias where a kernel adds that on the way."""
    if not kernels.active(x):
        return block(x, *arguments, **named), None
    return block(x, *arguments, add_bias=False, **named), block.output_bias


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
        cross_distances: bool = False,
    ) -> None:
        super().__init__()
        self.state = state
        self.numbers = tuple(numbers)
        self.layers = nn.ModuleList(
            ParallelTransformerLayer(
                config,
                state,
                f"{name}.layers.{number}",
                layer_type,
                cross_distances=cross_distances,
            )
            for number in numbers
        )
        ends_with_norm = post_process and config.model.norm_position == "pre"
        self.final_layernorm = (
            Norm(config, state, f"{name}.final_layernorm") if ends_with_norm else None
        )
        self.recomputed = _recomputed_runs(config, len(self.layers))
        self.stores_split = config.parallel.distribute_saved_activations

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """[s, b, h] -> [s, b, h]; s / t positions with sequence parallelism"""
        if context.extras is not None and context.extras.concerns_layers:
            x = self._run_probed(x, context, context.extras)
        else:
            x = self._run(x, context)
        return x if self.final_layernorm is None else self.final_layernorm(x)

    def _run(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        done = 0
        if self.training:
            for run in self.recomputed:
                x = self._run_recomputed(run, x, context)
                done = run.stop
        for place in range(done, len(self.layers)):
            x = self._layer(place, x, context)
        return x

    def _layer(self, place: int, x: torch.Tensor, context: Context) -> torch.Tensor:
        with annotated("layer", self.numbers[place]):
            return self.layers[place](x, context)

    def _run_probed(self, x: torch.Tensor, context: Context, extras: Extras) -> torch.Tensor:
        """One layer after the other, holding everything, for those who look inside."""
        for number, layer in zip(self.numbers, self.layers, strict=True):
            if extras.record.hidden_states is not None:
                extras.record.hidden_states.append(x)
            own, across = extras.probes(number)
            x = layer(x, context, (own, across))
            extras.keep(own, across)
        return x

    def _run_recomputed(self, run: range, x: torch.Tensor, context: Context) -> torch.Tensor:
        def part(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            own = context.holding(*tensors)
            for place in run:
                x = self._layer(place, x, own)
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
