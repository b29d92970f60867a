"""Cross entropy of tokens that are scored some at a time: the logits of a batch are never there.

For a long batch and a large vocabulary the logits are the largest tensor of a step. Here the rows
of the hidden states are scored in pieces: of each piece's logits only the three numbers of every
row are kept that its loss follows from (`megatron/ops/cross_entropy.py`). The backward pass scores
the piece once more, turns its logits into their gradient in place, and has done with them when
they have been multiplied into the gradients of hidden states, weight and bias.

Over the tensor axis the numbers of all rows are reduced together behind the last piece, as they are
without pieces, and so is the gradient of the hidden states.

Letters: s sequence, h hidden, v padded vocabulary, t tensor size, n rows: all leading dims
flattened.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron.mpu.collectives import all_gather, all_reduce, reduce_scatter
from megatron.mpu.cross_entropy import losses_of_all, own_tokens
from megatron.mpu.parallel_state import Axis
from megatron.ops.cross_entropy import logits_gradient, row_losses
from megatron.ops.matmul import add_product, linear_product, product


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        axis: Axis,
        vocab_size: int,
        chunk: int,
        split_sequence: bool,
    ) -> torch.Tensor:
        ctx.axis, ctx.chunk, ctx.split_sequence = axis, chunk, split_sequence
        ctx.tokens = own_tokens(weight.size(0), axis, vocab_size)
        rows = _rows(all_gather(x, axis) if split_sequence else x)
        targets = target.reshape(-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        statistics = rows.new_empty((3, rows.size(0)), dtype=wide)
        for piece in _pieces(rows.size(0), chunk):
            logits = linear_product(rows[piece], weight, bias)
            statistics[:, piece] = row_losses(logits, targets[piece], *ctx.tokens)[1]
            del logits  # before the next ones are made
        loss, maxima, totals = losses_of_all(statistics, axis)
        ctx.save_for_backward(x, weight, bias, targets, maxima, totals)
        return loss.view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight, bias, targets, maxima, totals = ctx.saved_tensors
        rows = _rows(all_gather(x, ctx.axis) if ctx.split_sequence else x)
        grads = grad.reshape(-1)
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_rows = torch.empty_like(rows) if needs_input else None
        grad_weight = _total(weight) if needs_weight else None
        grad_bias = _total(bias) if needs_bias else None
        for piece in _pieces(rows.size(0), ctx.chunk):
            logits = linear_product(rows[piece], weight, bias)
            of_rows = (targets[piece], maxima[piece], totals[piece], grads[piece])
            logits = logits_gradient(logits, *of_rows, *ctx.tokens, overwrite=True)
            if grad_rows is not None:
                grad_rows[piece] = product(logits, weight)
            if grad_weight is not None:
                add_product(grad_weight, logits.t(), rows[piece])
            if grad_bias is not None:
                grad_bias += logits.sum(dim=0, dtype=grad_bias.dtype)
            del logits
        grad_x = None if grad_rows is None else _input_gradient(ctx, grad_rows, x)
        return grad_x, _returned(weight, grad_weight), _returned(bias, grad_bias), *[None] * 5


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.size(-1))


def _pieces(rows: int, chunk: int) -> Iterator[slice]:
    for first in range(0, rows, chunk):
        yield slice(first, min(first + chunk, rows))


def _total(parameter: torch.Tensor) -> torch.Tensor:
    """What the terms of the parameter's gradient are added into."""
    main_grad: torch.Tensor | None = getattr(parameter, "main_grad", None)
    if main_grad is not None:
        return main_grad
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _returned(parameter: torch.Tensor | None, total: torch.Tensor | None) -> torch.Tensor | None:
    """What autograd is told of the gradient: nothing where it went into ``main_grad``."""
    if parameter is None or total is None or hasattr(parameter, "main_grad"):
        return None
    return total.to(parameter.dtype)


def _input_gradient(ctx: Any, grad_rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The sum over the axis: [n, h] -> as x."""
    if ctx.split_sequence:
        return reduce_scatter(grad_rows.view(-1, *x.shape[1:]), ctx.axis)
    return all_reduce(grad_rows, ctx.axis).view(x.shape)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    axis: Axis,
    vocab_size: int,
    *,
    chunk: int,
    split_sequence: bool = False,
) -> torch.Tensor:
    """Negative log-likelihood of each target under softmax(x W^T + b), scored in pieces.

    A zero-bubble schedule's backward pass computes the gradients of the weight and the bias at
    once: left for later they would need the logits.

    Args:
        x: [..., h], the same on all tensor ranks; with ``split_sequence`` [s / t, ..., h], this
            rank's part of the sequence.
        weight: [v / t, h], this rank's rows; bias: [v / t].
        target: i64[...] or, with ``split_sequence``, i64[s, ...]: global token numbers below
            ``vocab_size``.
        axis: the tensor axis.
        vocab_size: true size of the vocabulary, without padding.
        chunk: tokens at a time.

    Returns:
        As ``target``, in nats, in float32 or wider.
    """
    split_sequence = split_sequence and axis.size > 1
    return _LinearCrossEntropy.apply(
        x, weight, bias, target, axis, vocab_size, chunk, split_sequence
    )
