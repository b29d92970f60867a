"""Attention with the heads split over the tensor axis.

Letters: s sequence, z sequence of the keys, b micro-batch, h hidden, n heads, g heads of keys and
values, d head size, t tensor size.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn

from megatron.config import Config
from megatron.model.distances import Distances
from megatron.model.initial import init_methods
from megatron.model.module import parameter_dtype
from megatron.model.probe import Probe
from megatron.mpu import ColumnParallelLinear, ParallelState, RowParallelLinear, recompute
from megatron.mpu.fp8 import Fp8Recipe
from megatron.ops import kernels
from megatron.ops.attention import AttentionCore, AttentionMask
from megatron.ops.rotary import Rotation, rotate, split_heads


class ParallelAttention(nn.Module):
    """Self-attention, or with ``cross`` attention to what an encoder has made.

    The rows of ``query_key_value`` are ordered [g, n / g + 2, d]: n / g query heads, then the key
    and the value that they share (arXiv 2305.13245). An equal cut of them gives each rank whole
    heads with all that belongs to them. Across, ``query`` is ordered [n, d] and ``key_value``
    [g, 2, d].

    Args:
        distances: whether it has vectors for distances; by default where the configuration has
            them and it is not across.
    """

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        name: str,
        *,
        cross: bool = False,
        distances: bool | None = None,
    ) -> None:
        super().__init__()
        self.state = state
        model = config.model
        self.head_size = model.head_size
        self.shared = model.num_attention_heads // model.key_value_heads
        self.recomputes_core = config.parallel.recompute_granularity == "selective"
        core = partial(
            AttentionCore,
            backend=model.attention_backend,
            softmax_in_fp32=model.attention_softmax_in_fp32,
            scale=model.attention_scale,
        )
        self.scale = model.attention_scale or 1.0 / math.sqrt(self.head_size)
        self.training_core, self.core = core(dropout=model.attention_dropout), core()
        init, scaled_init = init_methods(config)
        bias, split = not model.disable_bias_linear, config.parallel.sequence_parallel
        dtype, fp8 = parameter_dtype(config), Fp8Recipe.of(model)
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
                fp8=fp8,
            )

        if cross:
            self.query = column(width, "query")
            self.key_value = column(2 * kv_width, "key_value")
            with_keys = self.key_value
        else:
            self.query_key_value = column(width + 2 * kv_width, "query_key_value")
            with_keys = self.query_key_value
        self.distance_embedding = None
        if model.has_distances and not cross if distances is None else distances:
            self.distance_embedding = Distances(config, state, f"{name}.distance_embedding")
        # A turned key's bias differs between positions, and then the softmax sees it; so it does
        # that of a key which is compared with distances.
        is_turned = model.position_embedding_type == "rope" and not cross
        self.turned_channels = model.rotary_channels if is_turned else 0
        if self.distance_embedding is not None and self.distance_embedding.with_keys:
            self.turned_channels = self.head_size
        self.shows_keys = False
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
            fp8=fp8,
        )

    def _without_key_part(self, bias_gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the bias with that of the keys' bias set to zero, where it is not turned.

        It adds the same number to all scores of a query, and the softmax does not see that: the
        gradient is zero but for rounding, from which Adam would make full steps at random. Keys
        that were handed out may have been used otherwise.
        """
        if self.shows_keys:
            return bias_gradient
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
        probe: Probe | None = None,
        add_bias: bool = True,
    ) -> torch.Tensor:
        """[s, b, h], keys and values from x or, across, from [z, b, h] -> [s, b, h]

        With sequence parallelism s / t and z / t positions. Without ``add_bias`` the bias of
        ``dense`` is left to the caller.
        """
        self.shows_keys = probe is not None
        if probe is not None:
            context = self._attend_probed(x, mask, encoder_output, probe)
        else:
            query, key, value = self._project(x, encoder_output, rotation)
            context = self._attend(query, key, value, mask)  # [s, b, n d / t]
        return self.dense(context, add_bias=add_bias)

    @property
    def output_bias(self) -> torch.Tensor | None:
        """The bias of the last product, [h]."""
        return self.dense.bias

    def _attend_probed(
        self,
        x: torch.Tensor,
        mask: AttentionMask,
        encoder_output: torch.Tensor | None,
        probe: Probe,
    ) -> torch.Tensor:
        """Attention with what was kept of earlier positions, leaving behind what is asked for."""
        if probe.past is not None and encoder_output is not None:
            query = self.query(x).unflatten(-1, (-1, self.head_size))
            key, value = (_by_position(part) for part in probe.past)
        else:
            query, key, value = self._project(x, encoder_output)
            if probe.past is not None:
                past_key, past_value = (_by_position(part) for part in probe.past)
                key, value = torch.cat((past_key, key)), torch.cat((past_value, value))
        probe.cache = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        core = self.training_core if self.training else self.core
        mask = self._with_distances(query, key, mask, from_last=probe.past is not None)
        with self._heads_drop_alone(core):
            if not probe.needs_weights:
                return core(query, key, value, mask)
            context, weights = core.with_weights(query, key, value, mask, probe.head_mask)
        if probe.wants_weights:
            probe.weights = weights
        return context

    def _with_distances(
        self, query: torch.Tensor, key: torch.Tensor, mask: AttentionMask, *, from_last: bool
    ) -> AttentionMask:
        """The mask with what the distances add to the scores."""
        if self.distance_embedding is None:
            return mask
        if key.size(2) != query.size(2):
            key = key.repeat_interleave(self.shared, dim=2)
        bias = self.distance_embedding(query, key, from_last=from_last) * self.scale
        return mask.with_bias(bias if mask.bias is None else bias + mask.bias)

    def _project(
        self,
        x: torch.Tensor,
        encoder_output: torch.Tensor | None,
        rotation: Rotation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [s, b, n / t, d], keys and values [z, b, g / t, d], not across turned."""
        d = self.head_size
        if encoder_output is not None:
            query = self.query(x).unflatten(-1, (-1, d))
            key, value = self.key_value(encoder_output).unflatten(-1, (-1, 2, d)).unbind(dim=3)
            return query, key, value
        mixed = self.query_key_value(x).unflatten(-1, (-1, self.shared + 2, d))
        if kernels.active(mixed):
            return split_heads(mixed, rotation, self.shared)
        query, key, value = mixed.split((self.shared, 1, 1), dim=3)
        query, key, value = query.flatten(2, 3), key.squeeze(3), value.squeeze(3)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return query, key, value

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
        mask = self._with_distances(query, key, mask, from_last=False)
        with self._heads_drop_alone(core):
            return core(query, key, value, mask)

    def _heads_drop_alone(self, core: AttentionCore) -> AbstractContextManager[None]:
        """Other heads live on the other tensor ranks: their weights drop independently."""
        return self.state.streams.split_region() if core.dropout > 0.0 else nullcontext()


def _by_position(cached: torch.Tensor) -> torch.Tensor:
    """[b, g / t, z, d] -> [z, b, g / t, d]"""
    return cached.permute(2, 0, 1, 3)
