"""Positions that are not part of the embedding: rotations, and T5's bias by distance.

Letters: s sequence, z sequence of the keys, b micro-batch, n heads, t tensor size.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from megatron.config import Config
from megatron.model.enums import AttnMaskType
from megatron.model.initial import init_methods
from megatron.model.module import new_parameter
from megatron.mpu import ParallelState, ShardSpec, Stage
from megatron.mpu.layers import embedding_lookup
from megatron.ops.rotary import Rotation, rotation


def rotations(
    config: Config,
    length: int,
    position_ids: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Rotation | None:
    """The rotation of each of ``length`` positions, or of ``position_ids`` i64[b, s].

    None where the model has no rotary positions.
    """
    model = config.model
    if model.position_embedding_type != "rope":
        return None
    if position_ids is None:
        positions = torch.arange(length, device=device).unsqueeze(1)
    else:
        positions = position_ids.t()
    return rotation(positions, model.rotary_channels, model.rotary_base, dtype)


class RelativeBias(nn.Module):
    """A learned bias of the attention scores for each head and each range of distances.

    Source: arXiv 1910.10683, section 2.1. All layers of a stack share it, hence every stage holds
    it; those behind the first hold copies that are tied to the first one's.

    Args:
        mask_type: where keys are never ahead, all buckets are for distances backwards.
    """

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        stage: Stage,
        name: str,
        mask_type: AttnMaskType,
    ) -> None:
        super().__init__()
        model = config.model
        self.causal = mask_type is AttnMaskType.causal
        self.buckets = model.relative_attention_num_buckets
        self.max_distance = model.relative_attention_max_distance
        owner = f"{name}.weight"
        spec = ShardSpec(
            owner if stage.is_first else f"{name}.copy",
            (self.buckets, model.num_attention_heads),
            dim=1,
            tied_to=None if stage.is_first else owner,
        )
        # Initial values go by the owner's name: copies are equal from the start.
        self.weight = new_parameter(config, state, spec, init_methods(config)[0])

    def forward(self, s: int, z: int) -> torch.Tensor:
        """The bias of s queries on z keys, [1, n / t, s, z]."""
        device = self.weight.device
        distance = torch.arange(z, device=device) - torch.arange(s, device=device)[:, None]
        bias = embedding_lookup(self._bucket(distance), self.weight)  # [s, z, n / t]
        return bias.permute(2, 0, 1).unsqueeze(0)

    def _bucket(self, distance: torch.Tensor) -> torch.Tensor:
        """The bucket of each distance from query to key, i64[s, z].

        Half of the buckets of a direction are for one distance each, the other half for ranges
        that grow exponentially up to ``max_distance``; all beyond share the last.
        """
        buckets, first = self.buckets, torch.zeros_like(distance)
        if not self.causal:
            buckets //= 2
            first = torch.where(distance > 0, buckets, first)
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        growth = math.log(self.max_distance / exact)
        far = exact + (
            torch.log(distance.clamp(min=1).double() / exact) / growth * (buckets - exact)
        ).long().clamp(max=buckets - exact - 1)
        return first + torch.where(distance < exact, distance, far)
