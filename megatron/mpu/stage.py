"""Which layers a pipeline stage holds, as arithmetic. This file imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline of ``count`` stages and the run of global layers it holds."""

    index: int
    count: int
    first_layer: int
    num_layers: int

    @property
    def is_first(self) -> bool:
        """Whether this stage holds the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage holds the heads and computes the loss."""
        return self.index == self.count - 1

    @property
    def layers(self) -> range:
        """The global numbers of this stage's layers, from 0."""
        return range(self.first_layer, self.first_layer + self.num_layers)


def stages(layers_per_stage: Sequence[int]) -> tuple[Stage, ...]:
    """The stages of a pipeline whose i-th stage holds ``layers_per_stage[i]`` layers."""
    firsts = accumulate(layers_per_stage, initial=0)
    count = len(layers_per_stage)
    return tuple(
        Stage(index, count, first, layers)
        for index, (first, layers) in enumerate(zip(firsts, layers_per_stage, strict=False))
    )
