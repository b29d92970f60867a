"""A GPT as one would write it in plain PyTorch.

Letters: b batch, s sequence, h hidden, n heads of this rank, d head size, v vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.sizes import EPSILON, Sizes


class Block(nn.Module):
    """x + attention(norm(x)), x + mlp(norm(x)); attention without its projections."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        h = sizes.hidden
        self.head_size = h // sizes.heads
        self.norm_1 = nn.LayerNorm(h, eps=EPSILON)
        self.qkv = nn.Linear(h, 3 * h)
        self.projection = nn.Linear(h, h)
        self.norm_2 = nn.LayerNorm(h, eps=EPSILON)
        self.up = nn.Linear(h, 4 * h)
        self.down = nn.Linear(4 * h, h)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        x = x + self.projection(self._attend(self.qkv(self.norm_1(x))))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))

    def _attend(self, mixed: Tensor) -> Tensor:
        """[b, s, n 3 d] -> [b, s, n d]"""
        heads = mixed.unflatten(-1, (-1, 3, self.head_size)).transpose(1, 2)  # [b, n, s, 3, d]
        query, key, value = heads.unbind(3)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return context.transpose(1, 2).flatten(2)


class Embedding(nn.Module):
    """Words and positions."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.words = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.positions = nn.Embedding(sizes.sequence, sizes.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """i64[b, s] -> [b, s, h]"""
        positions = torch.arange(tokens.size(1), device=tokens.device)
        return self.words(tokens) + self.positions(positions)


class PlainGPT(nn.Module):
    """The whole network, or the layers `numbers` with its begin or its end.

    Attributes:
        embedding: None where the network does not begin here.
        norm, head: None where it does not end here; the head's weight is the word embedding's,
            or, where that is on another stage, a copy of it.
    """

    def __init__(
        self, sizes: Sizes, numbers: range, *, begins: bool = True, ends: bool = True
    ) -> None:
        super().__init__()
        self.embedding = Embedding(sizes) if begins else None
        self.blocks = nn.ModuleDict({str(number): Block(sizes) for number in numbers})
        self.norm = nn.LayerNorm(sizes.hidden, eps=EPSILON) if ends else None
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False) if ends else None
        self._fill(sizes)
        self.tie()

    def tie(self) -> None:
        """Make the head's weight the word embedding's, where both are here."""
        if self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.words.weight

    @torch.no_grad()
    def _fill(self, sizes: Sizes) -> None:
        for name, parameter in self.named_parameters():
            kind = name.removeprefix("blocks.").removeprefix("embedding.")
            kind = kind.removesuffix(".weight").replace("head", "words")
            if kind in sizes.weights:
                parameter.copy_(sizes.weights[kind])
            elif name.endswith(".bias"):
                parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """i64[b, s], or [b, s, h] -> [b, s, h], or logits [b, s, v]"""
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks.values():
            x = block(x)
        if self.norm is None or self.head is None:
            return x
        return self.head(self.norm(x))


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """[b, s, v], i64[b, s] -> scalar"""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
