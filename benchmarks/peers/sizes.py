"""The GPT, the batch and the layouts that all contestants share.

The output layer costs about as much as one layer, so that an odd number of layers makes two equal
pipeline stages: (layers + 1) / 2 of them in front, the others and the output layer behind.

Letters: b batch, s sequence, h hidden, n heads, d head size, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
CLIP = 1.0
EPSILON = 1e-5
STD = 0.02
BATCHES = 4

LAYOUTS = ("single", "tp", "tp-sp", "pp", "dp")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained: a float32 GPT with learned positions, tied embeddings and no dropout."""

    hidden: int = 512
    layers: int = 5
    heads: int = 8
    sequence: int = 256
    vocabulary: int = 6144
    batch: int = 8
    micro_batches: int = 4

    @property
    def stage_layers(self) -> tuple[int, int]:
        """Layers of the two pipeline stages."""
        behind = self.layers // 2
        return self.layers - behind, behind

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.sequence

    @property
    def flops(self) -> float:
        """Operations of a step that the mathematics asks for; causal attention counts half."""
        h, s = self.hidden, self.sequence
        layer = 2 * 12 * h * h + 2 * s * h
        return 3.0 * self.tokens * (self.layers * layer + 2 * h * self.vocabulary)

    def batches(self) -> list[Tensor]:
        """Global batches of random tokens, i64[b, s + 1]: input and, one further, target."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.sequence + 1)
        return [torch.randint(self.vocabulary, shape, generator=generator) for _ in range(BATCHES)]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The initial matrices; norms begin as the identity and biases at zero.

        Rows of "qkv" are ordered [n, 3, d].
        """
        generator = torch.Generator().manual_seed(1)
        h = self.hidden
        shapes = {"words": (self.vocabulary, h), "positions": (self.sequence, h)}
        for i in range(self.layers):
            shapes[f"{i}.qkv"] = (3 * h, h)
            shapes[f"{i}.projection"] = (h, h)
            shapes[f"{i}.up"] = (4 * h, h)
            shapes[f"{i}.down"] = (h, 4 * h)
        return {
            name: torch.randn(shape, generator=generator) * STD for name, shape in shapes.items()
        }

    def part(self, name: str, rank: int, size: int) -> Tensor:
        """What one of `size` tensor ranks holds of a matrix."""
        kind = name.rpartition(".")[2]
        weight = self.weights[name]
        if kind == "positions":
            return weight
        return weight.chunk(size, dim=1 if kind in ("projection", "down") else 0)[rank]
