"""What may be given to a forward pass beside its input, and what it may leave behind.

Training needs none of it. Those who look into a model do: the attention weights, the keys and
values to go on from, the stream between the layers; and those who silence a head, or start from
vectors in place of tokens.

Letters: s sequence, z sequence of the keys, b micro-batch, h hidden, n heads, g heads of keys and
values, d head size, t tensor size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron.ops.attention import AttentionMask


@dataclass
class Probe:
    """Of one attention block: what it is given, and what it leaves behind.

    Attributes:
        head_mask: factor of the attention weights, broadcast to [b, n / t, s, z].
        past: keys and values [b, g / t, z, d] of earlier positions; across, of the encoder.
        wants_weights: whether to leave the weights behind.
        weights: left behind, [b, n / t, s, z].
        cache: left behind, all keys and values [b, g / t, z, d].
    """

    head_mask: torch.Tensor | None = None
    past: tuple[torch.Tensor, torch.Tensor] | None = None
    wants_weights: bool = False
    weights: torch.Tensor | None = None
    cache: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def needs_weights(self) -> bool:
        """Whether the weights have to be computed as such."""
        return self.wants_weights or self.head_mask is not None


@dataclass
class Record:
    """Of the layers of one stage, what was asked for; what was not is None.

    Attributes:
        hidden_states: the stream in front of each layer, [s, b, h].
        attentions, cross_attentions: the weights of each layer, [b, n / t, s, z].
        caches: of each layer keys and values, and in front of an encoder those across.
    """

    hidden_states: list[torch.Tensor] | None = None
    attentions: list[torch.Tensor] | None = None
    cross_attentions: list[torch.Tensor] | None = None
    caches: list[tuple[torch.Tensor, ...]] | None = None


@dataclass(frozen=True)
class Extras:
    """All that a forward pass of a language model is given beside ids and masks.

    Attributes:
        inputs_embeds: [b, s, h] in place of the word embeddings of the ids.
        encoder_output: [z, b, h], what layers with cross attention attend to; without it they
            leave that out.
        encoder_mask: which of it is no padding.
        head_masks: for each layer of the model, a factor of its attention weights.
        past: for each layer of the model, the cache of an earlier pass.
        record: where to leave what was asked for.
    """

    inputs_embeds: torch.Tensor | None = None
    encoder_output: torch.Tensor | None = None
    encoder_mask: AttentionMask = AttentionMask()  # noqa: RUF009 - it is frozen
    head_masks: torch.Tensor | None = None
    past: Sequence[tuple[torch.Tensor, ...]] | None = None
    record: Record = field(default_factory=Record)

    @property
    def concerns_layers(self) -> bool:
        """Whether layers have to be run one by one and watched."""
        record = self.record
        asked = (record.hidden_states, record.attentions, record.caches)
        given = (self.head_masks, self.past)
        return any(each is not None for each in (*asked, *given))

    def probes(self, number: int) -> tuple[Probe, Probe]:
        """The probes of layer `number`'s attention to its own and to the encoder's positions."""
        head_mask = None if self.head_masks is None else self.head_masks[number]
        past = () if self.past is None else self.past[number]
        wants = self.record.attentions is not None
        own = (past[0], past[1]) if past else None
        across = (past[2], past[3]) if len(past) == 4 else None
        return Probe(head_mask, own, wants), Probe(head_mask, across, wants)

    def keep(self, own: Probe, across: Probe) -> None:
        """Record what the probes of a layer brought."""
        record = self.record
        if record.attentions is not None:
            assert own.weights is not None
            record.attentions.append(own.weights)
        if record.cross_attentions is not None and across.weights is not None:
            record.cross_attentions.append(across.weights)
        if record.caches is not None:
            assert own.cache is not None
            record.caches.append(own.cache + (across.cache or ()))
