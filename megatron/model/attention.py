"""Attention with the heads split over the tensor axis.

Letters: s sequence, z sequence of the keys, b micro-batch, h hidden, n heads, g heads of keys and
values, d head size, t tensor size.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from megatron.config import Config
from megatron.model.initial import init_methods
from megatron.model.module import parameter_dtype
from megatron.mpu import ColumnParallelLinear, ParallelState, RowParallelLinear, recompute
from megatron.ops.attention import AttentionCore, AttentionMask
from megatron.ops.rotary import Rotation, rotate


class ParallelAttention(nn.Module):
    """Self-attention, or with ``cross`` attention to what an encoder has made.

    The rows of ``query_key_value`` are ordered [g, n / g + 2, d]: n / g query heads, then the key
    and the value that they share (arXiv 2305.13245). An equal cut of them gives each rank whole
    heads with all that belongs to them. Across, ``query`` is ordered [n, d] and ``key_value``
    [g, 2, d].
    """

    def __init__(
        self, config: Config, state: ParallelState, name: str, *, cross: bool = False
    ) -> None:
        super().__init__()
        self.state = state
        model = config.model
        self.head_size = model.head_size
        self.shared = model.num_attention_heads // model.key_value_heads
        self.recomputes_core = config.parallel.recompute_granularity == "selective"
        core = partial(
            AttentionCore,
            fused=model.attention_backend == "auto",
            softmax_in_fp32=model.attention_softmax_in_fp32,
        )
        self.training_core, self.core = core(dropout=model.attention_dropout), core()
        init, scaled_init = init_methods(config)
        bias, split = not model.disable_bias_linear, config.parallel.sequence_parallel
        dtype = parameter_dtype(config)
        width, kv_width = (
            n * self.head_size for n in (model.num_attention_heads, model.key_value_heads)
        )

        def column(output_size: int, part: str) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                model.hidden_size,
                output_size,
                name=f"{name}.{part}",
                state=state,
                init_method=init,
                dtype=dtype,
                bias=bias,
                sequence_parallel=split,
            )

        if cross:
            self.query = column(width, "query")
            self.key_value = column(2 * kv_width, "key_value")
            with_keys = self.key_value
        else:
            self.query_key_value = column(width + 2 * kv_width, "query_key_value")
            with_keys = self.query_key_value
        # A turned key's bias differs between positions, and then the softmax sees it.
        is_turned = model.position_embedding_type == "rope" and not cross
        self.turned_channels = model.rotary_channels if is_turned else 0
        if with_keys.bias is not None and self.turned_channels < self.head_size:
            with_keys.bias.register_hook(self._without_key_part)
        self.dense = RowParallelLinear(
            width,
            model.hidden_size,
            name=f"{name}.dense",
            state=state,
            init_method=scaled_init,
            dtype=dtype,
            bias=bias,
            sequence_parallel=split,
        )

    def _without_key_part(self, bias_gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the bias with that of the keys' bias set to zero, where it is not turned.

        It adds the same number to all scores of a query, and the softmax does not see that: the
        gradient is zero but for rounding, from which Adam would make full steps at random.
        """
        gradient = bias_gradient.clone()
        heads = 2 if hasattr(self, "key_value") else self.shared + 2
        gradient.view(-1, heads, self.head_size)[:, -2, self.turned_channels :] = 0.0
        return gradient

    def forward(
        self,
        x: torch.Tensor,
        mask: AttentionMask,
        *,
        rotation: Rotation | None = None,
        encoder_output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[s, b, h], keys and values from x or, across, from [z, b, h] -> [s, b, h]

        With sequence parallelism s / t and z / t positions.
        """
        query, key, value = self._project(x, encoder_output)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return self.dense(self._attend(query, key, value, mask))  # [s, b, n d / t] -> [s, b, h]

    def _project(
        self, x: torch.Tensor, encoder_output: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [s, b, n / t, d], keys and values [z, b, g / t, d]."""
        d = self.head_size
        if encoder_output is not None:
            query = self.query(x).unflatten(-1, (-1, d))
            key, value = self.key_value(encoder_output).unflatten(-1, (-1, 2, d)).unbind(dim=3)
            return query, key, value
        mixed = self.query_key_value(x).unflatten(-1, (-1, self.shared + 2, d))
        query, key, value = mixed.split((self.shared, 1, 1), dim=3)
        return query.flatten(2, 3), key.squeeze(3), value.squeeze(3)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: AttentionMask
    ) -> torch.Tensor:
        """[s, b, n / t, d], [z, b, g / t, d] twice -> [s, b, n d / t]"""
        core = self.training_core if self.training else self.core
        if not (self.recomputes_core and self.training):
            return self._run(core, query, key, value, mask)

        def part(*inputs: torch.Tensor) -> torch.Tensor:
            query, key, value, *bias = inputs
            return self._run(core, query, key, value, mask.with_bias(bias[0] if bias else None))

        bias = () if mask.bias is None else (mask.bias,)
        return recompute(part, query, key, value, *bias, streams=self.state.streams)

    def _run(
        self,
        core: AttentionCore,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: AttentionMask,
    ) -> torch.Tensor:
        if core.dropout == 0.0:
            return core(query, key, value, mask)
        # Other heads live on the other tensor ranks: their weights drop independently.
        with self.state.streams.split_region():
            return core(query, key, value, mask)
