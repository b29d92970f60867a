"""Which layers a pipeline stage holds, as arithmetic. This file imports no torch.

A worked example, an encoder-decoder of 4 + 2 layers on 3 stages whose decoder begins at stage 2::

    stage      0              1              2
    holds      embedding                     embedding (a copy)
               encoder 0, 1   encoder 2, 3   decoder 0, 1
                              final norm     final norm, head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline of ``count`` stages and the run of global layers it holds.

    ``split`` is the stage at which an encoder-decoder's decoder begins, 0 where a single stage
    holds both, and None for other models. The layers of the decoder count from 0, too.
    """

    index: int
    count: int
    first_layer: int
    num_layers: int
    first_decoder_layer: int = 0
    num_decoder_layers: int = 0
    split: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether this stage holds the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage holds the heads and computes the loss."""
        return self.index == self.count - 1

    @property
    def has_encoder(self) -> bool:
        """Whether this stage is part of the encoder, or of the only stack of layers."""
        return self.split is None or self.index < self.split or self.count == 1

    @property
    def has_decoder(self) -> bool:
        """Whether this stage is part of an encoder-decoder's decoder."""
        return self.split is not None and self.index >= self.split

    @property
    def ends_encoder(self) -> bool:
        """Whether the encoder's last layer is here, or behind it on no other stage."""
        last = self.count - 1 if self.split is None else max(self.split - 1, 0)
        return self.index == last

    @property
    def begins_decoder(self) -> bool:
        """Whether the decoder's embedding is here."""
        return self.split is not None and self.index == self.split

    @property
    def layers(self) -> range:
        """The global numbers of this stage's layers, from 0."""
        return range(self.first_layer, self.first_layer + self.num_layers)

    @property
    def decoder_layers(self) -> range:
        """The numbers of this stage's layers within the decoder, from 0."""
        return range(self.first_decoder_layer, self.first_decoder_layer + self.num_decoder_layers)


def stages(layers_per_stage: Sequence[int]) -> tuple[Stage, ...]:
    """The stages of a pipeline whose i-th stage holds ``layers_per_stage[i]`` layers."""
    count = len(layers_per_stage)
    return tuple(
        Stage(index, count, first, layers)
        for index, (first, layers) in enumerate(_runs(layers_per_stage))
    )


def encoder_decoder_stages(
    encoder: Sequence[int], decoder: Sequence[int], split: int
) -> tuple[Stage, ...]:
    """The stages of an encoder-decoder from the layers of each encoder and decoder stage.

    ``split`` is the number of encoder stages, or 0 for a single stage that holds both.
    """
    if split == 0:
        return (Stage(0, 1, 0, sum(encoder), 0, sum(decoder), split),)
    count = len(encoder) + len(decoder)
    first_part = (
        Stage(index, count, first, layers, split=split)
        for index, (first, layers) in enumerate(_runs(encoder))
    )
    second_part = (
        Stage(split + index, count, sum(encoder), 0, first, layers, split)
        for index, (first, layers) in enumerate(_runs(decoder))
    )
    return (*first_part, *second_part)


def _runs(layers_per_stage: Sequence[int]) -> list[tuple[int, int]]:
    """(first layer, number of layers) of each stage."""
    firsts = accumulate(layers_per_stage, initial=0)
    return list(zip(firsts, layers_per_stage, strict=False))
