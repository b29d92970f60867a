"""What the documented `forward` of the family is given.

Letters: s sequence, z sequence of the encoder or of all keys, b batch, h hidden, n heads, d head
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron.ops.attention import AttentionMask

Cache = Sequence[tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Inputs:
    """What the documented `forward` is given, under the documented names."""

    input_ids: torch.Tensor | None = None  # i64[b, s]
    attention_mask: torch.Tensor | None = None  # [b, z] or [b, s, z], 1 for what may be seen
    token_type_ids: torch.Tensor | None = None  # i64[b, s]
    position_ids: torch.Tensor | None = None  # i64[b, s] or i64[1, s]
    head_mask: torch.Tensor | None = None  # [n] or [layers, n], 1 for heads that are kept
    inputs_embeds: torch.Tensor | None = None  # [b, s, h]
    encoder_hidden_states: torch.Tensor | None = None  # [b, z, h]
    encoder_attention_mask: torch.Tensor | None = None  # [b, z] or [b, s, z]
    past_key_values: Cache | None = None  # of each layer 2 or 4 x [b, n, z, d]
    use_cache: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None

    @property
    def given(self) -> torch.Tensor:
        """The ids or the embeddings; raises ValueError unless there is one of them."""
        if (self.input_ids is None) == (self.inputs_embeds is None):
            found = "neither" if self.input_ids is None else "both"
            raise ValueError(f"expected either input_ids or inputs_embeds, found {found}")
        given = self.inputs_embeds if self.input_ids is None else self.input_ids
        assert given is not None
        return given

    @property
    def shape(self) -> tuple[int, int]:
        """(b, s)"""
        return self.given.size(0), self.given.size(1)

    @property
    def shared(self) -> list[torch.Tensor]:
        """What every stage is given, and backward has to come by on each.

        Of a cache one tensor stands for all, since one pass through the stages has made it.
        """
        cached = [part for cache in self.past_key_values or () for part in cache]
        given = (self.inputs_embeds, self.encoder_hidden_states, *cached[:1])
        return [each for each in given if each is not None]

    @property
    def past_length(self) -> int:
        """Positions that the cache already holds."""
        return 0 if not self.past_key_values else self.past_key_values[0][0].size(2)

    @property
    def device(self) -> torch.device:
        """Where the inputs lie."""
        return self.given.device

    def check(self, config: Any) -> None:
        """Raise ValueError for what a model of this configuration cannot be given."""
        length = self.shape[1] + self.past_length
        crosses = config.is_decoder and self.encoder_hidden_states is not None
        if crosses and not config.add_cross_attention:
            raise ValueError(
                "encoder_hidden_states were given, but the model has no cross attention: "
                "expected a config with add_cross_attention=True"
            )
        if self.position_ids is None and length > config.max_position_embeddings:
            raise ValueError(
                f"{length} positions were given, more than "
                f"max_position_embeddings {config.max_position_embeddings}"
            )
        past = self.past_key_values
        if past and len(past) != config.num_hidden_layers:
            raise ValueError(
                f"past_key_values are those of {len(past)} layers, "
                f"expected num_hidden_layers {config.num_hidden_layers}"
            )
        self._check_ids(config.vocab_size)
        self._check_mask("attention_mask", self.attention_mask, length)
        if crosses and self.encoder_hidden_states is not None:
            length = self.encoder_hidden_states.size(1)
            self._check_mask("encoder_attention_mask", self.encoder_attention_mask, length)

    def _check_ids(self, vocab_size: int) -> None:
        """Raise ValueError for ids of no token, which embeddings split by rows would leave out."""
        ids = self.input_ids
        # Only the CPU can look without waiting for a device.
        if ids is None or ids.device.type != "cpu" or not ids.numel():
            return
        least, most = (int(each) for each in ids.aminmax())
        if least < 0 or most >= vocab_size:
            wrong = least if least < 0 else most
            raise ValueError(f"input_ids hold {wrong}, expected 0 to {vocab_size - 1}")

    def _check_mask(self, name: str, mask: torch.Tensor | None, length: int) -> None:
        """Raise ValueError unless a mask covers `length` positions; one row stands for all."""
        if mask is None:
            return
        b, s = self.shape
        fits = zip(for_all_heads(mask).shape, (b, 1, s, length), strict=True)
        if not all(found in (1, expected) for found, expected in fits):
            raise ValueError(
                f"{name} has the shape {tuple(mask.shape)}, "
                f"expected ({b}, {length}) or ({b}, {s}, {length})"
            )

    def seen(self, *, is_decoder: bool) -> torch.Tensor | None:
        """1 for what may be seen, 0 for what may not, broadcast to [b, n, s, z]; None for all 1."""
        mask = self.attention_mask
        if not is_decoder or (mask is not None and mask.dim() == 3):
            return None if mask is None else for_all_heads(mask)
        _, s = self.shape
        z = s + self.past_length
        not_ahead = torch.ones((s, z), device=self.device).tril(self.past_length)[None, None]
        return not_ahead if mask is None else not_ahead * for_all_heads(mask)

    @property
    def positions(self) -> torch.Tensor | None:
        """i64[b or 1, s]; None where positions count from 0."""
        past = self.past_length
        if self.position_ids is not None or not past:
            return self.position_ids
        return torch.arange(past, past + self.shape[1], device=self.device).unsqueeze(0)


def for_all_heads(mask: torch.Tensor) -> torch.Tensor:
    """[b, z] or [b, s, z] -> [b, 1, 1 or s, z]"""
    if mask.dim() not in (2, 3):
        raise ValueError(
            f"a mask has the shape {tuple(mask.shape)}, "
            "expected (batch, sequence) or (batch, from sequence, to sequence)"
        )
    return mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]


def masked(seen: torch.Tensor, *, can_look: bool) -> AttentionMask:
    """The mask that hides what is not `seen`, 1 or 0 or between, broadcast to [b, n, s, z].

    Args:
        can_look: whether values can be looked at without waiting for a device. If not, a query of
            which all keys are hidden sees them all: what attention makes of it has no meaning, and
            has the right gradient in every implementation.
    """
    if can_look and bool((seen == 1).all()):
        return AttentionMask()
    bias = (1.0 - seen) * torch.finfo(seen.dtype).min
    sees_nothing = bias.amax(-1, keepdim=True) < 0
    if can_look:
        return AttentionMask(bias=bias, hides_all=bool(sees_nothing.any()))
    return AttentionMask(bias=bias.masked_fill(sees_nothing, 0.0))
