"""The attention core: softmax(q k^T / sqrt(d)) v.

Which keys a query may see is an :class:`AttentionMask`, in parts: whether keys must not be ahead,
which keys are padding, where documents end. No part of it is as large as s x s, except the bias of
T5. Documents are taken one by one, so that attention across them costs nothing, neither memory nor
work.

On a GPU the fused computations are PyTorch's (`fused_attention`); what needs the weights
themselves makes them with this project's softmax.

Letters: s sequence, z sequence of the keys, b micro-batch, n heads of this rank, g heads of keys
and values, d head size, m most documents in a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from megatron.ops import kernels
from megatron.ops.dropout import dropout
from megatron.ops.fused_attention import (
    Documents,
    document_attention,
    fused_attention,
    takes_documents,
)
from megatron.ops.planned import device_type
from megatron.ops.softmax import scaled_softmax


@dataclass(frozen=True)
class AttentionMask:
    """What a query may see, and how much it prefers it.

    Attributes:
        causal: only keys at its own position and before.
        keys: bool[b, 1, 1, z], True where a key is real; None where all are.
        document_lengths: i64[b, m] on the host, the lengths of the documents that make up each
            row, filled up with zeros: only keys of its own document. None for one document.
        bias: added to the scores, broadcast to [b, n, s, z]; None for none.
        hides_all: whether the bias pushes all scores of some query below any that a score can be.
            All its weights are then equal; fused implementations, which keep of a query the
            logarithm of its weights' sum, find other ones in the backward pass.
    """

    causal: bool = False
    keys: torch.Tensor | None = None
    document_lengths: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    hides_all: bool = False

    def with_bias(self, bias: torch.Tensor | None) -> AttentionMask:
        """This mask with another bias."""
        return self if bias is self.bias else replace(self, bias=bias)

    @cached_property
    def documents(self) -> Documents:
        """The documents, which all layers ask for."""
        assert self.document_lengths is not None
        return Documents(self.document_lengths)


def padding_mask(real: torch.Tensor) -> torch.Tensor | None:
    """The ``keys`` of a mask for keys that may be padding.

    Args:
        real: bool[b, s], True where a token is real.

    Returns:
        bool[b, 1, 1, s], or None where it is known at no cost that nothing is padding.
    """
    # Only the CPU can look without waiting for a device. A plan counts on full sequences.
    if device_type(real) == "cpu" and (real.is_meta or bool(real.all())):
        return None
    return real[:, None, None, :]


@dataclass(frozen=True)
class AttentionCore:
    """softmax(q k^T / sqrt(d)) v in one way of computing it.

    Attributes:
        dropout: probability with which an attention weight is dropped.
        scale: factor of the scores; 1 / sqrt(d) where None.
        backend: PyTorch's fused implementation to use, "auto" for the best one, whose softmax is
            in float32; or "unfused", one operation after another, holding all attention weights.
        softmax_in_fp32: whether the unfused scores of half precision are scaled and masked in
            float32; the softmax itself always computes in it.
    """

    dropout: float = 0.0
    scale: float | None = None
    backend: str = "auto"
    softmax_in_fp32: bool = False

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: AttentionMask
    ) -> torch.Tensor:
        """[s, b, n, d], [z, b, g, d], [z, b, g, d] -> [s, b, n * d]; g divides n."""
        if mask.document_lengths is not None and takes_documents(query, self.backend):
            assert mask.keys is None and mask.bias is None
            return document_attention(
                query,
                key,
                value,
                mask.documents,
                dropout=self.dropout,
                causal=mask.causal,
                scale=self.scale,
            ).flatten(2)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, d]
        if mask.document_lengths is None:
            context = self._attend(query, key, value, mask)
        else:
            context = self._by_document(query, key, value, mask)
        return context.permute(2, 0, 1, 3).flatten(2)

    def with_weights(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: AttentionMask,
        head_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, with the attention weights that it was made with: [s, b, n d], [b, n, s, z].

        Args:
            head_mask: a factor of the weights, broadcast to [b, n, s, z]: 0 silences a head.
        """
        assert mask.document_lengths is None
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context, weights = self._unfused(query, key, value, mask, head_mask)
        return context.permute(2, 0, 1, 3).flatten(2), weights

    def _by_document(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: AttentionMask
    ) -> torch.Tensor:
        """Each document by itself; on paper, the blocks on the diagonal of an s x s mask."""
        assert mask.document_lengths is not None and mask.keys is None and mask.bias is None
        own = replace(mask, document_lengths=None)
        rows = []
        for row, lengths in enumerate(mask.document_lengths.tolist()):
            parts = []
            for start, stop in _bounds(lengths):
                at = slice(row, row + 1), slice(None), slice(start, stop)
                parts.append(self._attend(query[at], key[at], value[at], own, new_shapes=True))
            rows.append(torch.cat(parts, dim=2))
        return torch.cat(rows)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: AttentionMask,
        *,
        new_shapes: bool = False,
    ) -> torch.Tensor:
        """[b, n, s, d] each -> [b, n, s, d]"""
        # PyTorch has no fused attention with dropout for the CPU, and its plain one holds more.
        fused = (
            self.backend != "unfused"
            and not mask.hides_all
            and not (self.dropout > 0.0 and device_type(query) == "cpu")
        )
        if not fused:
            return self._unfused(query, key, value, mask)[0]
        dense = _dense(mask, query, key)
        return fused_attention(
            query,
            key,
            value,
            dense,
            dropout=self.dropout,
            causal=mask.causal and dense is None,
            scale=self.scale,
            backend=self.backend,
            new_shapes=new_shapes,
        )

    def _unfused(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: AttentionMask,
        head_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[b, n, s, d] each -> [b, n, s, d] and the weights [b, n, s, z]"""
        if key.size(1) != query.size(1):
            shared = query.size(1) // key.size(1)
            key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
        scores = query @ key.transpose(2, 3)  # [b, n, s, z]
        weights = dropout(self._weights(scores, mask, query, key), self.dropout)
        if head_mask is not None:
            weights = weights * head_mask
        return weights @ value, weights

    def _weights(
        self, scores: torch.Tensor, mask: AttentionMask, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        """[b, n, s, z] -> [b, n, s, z] in the format of the queries"""
        scale = self.scale
        if mask.bias is None and kernels.active(scores):
            factor = 1.0 / math.sqrt(query.size(3)) if scale is None else scale
            return scaled_softmax(scores, mask.keys, scale=factor, causal=mask.causal)
        if self.softmax_in_fp32 or self.backend != "unfused":
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores / math.sqrt(query.size(3)) if scale is None else scores * scale
        dense = _dense(mask, query, key, always=True)
        if dense is not None:
            scores = _masked(scores, dense)
        return torch.softmax(scores, dim=-1).to(query.dtype)


def _bounds(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Where each document of a row begins and ends."""
    start = 0
    for length in lengths:
        if length:
            yield start, start + length
            start += length


def _masked(scores: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    if dense.dtype == torch.bool:
        return scores.masked_fill(~dense, float("-inf"))
    return scores + dense


def _dense(
    mask: AttentionMask, query: torch.Tensor, key: torch.Tensor, always: bool = False
) -> torch.Tensor | None:
    """The mask as one tensor that broadcasts to [b, n, s, z]: bool, or scores to add.

    None where it would say nothing, or only that it is causal and this is not ``always`` wanted.
    """
    if not always and mask.keys is None and mask.bias is None:
        return None
    seen = mask.keys
    if mask.causal:
        shape = query.size(2), key.size(2)
        not_ahead = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        seen = not_ahead if seen is None else seen & not_ahead
    if mask.bias is None:
        return seen
    return mask.bias if seen is None else mask.bias.masked_fill(~seen, float("-inf"))
