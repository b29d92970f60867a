"""Cross entropy over logits that are split along the vocabulary.

The logits are never gathered. With z the logits of one position, m = max z and y its target,

    loss = log(sum_v exp(z_v - m)) - (z_y - m)

needs from the other tensor ranks only three numbers per position: the maximum, and, reduced
together, the sum of exponentials and the target's logit, which a single rank holds
(arXiv 1909.08053, section 3).

Kernels (`megatron/ops/cross_entropy.py`) pass once over the logits and hold nothing but these
numbers beside them. PyTorch's operators turn the logits into exponentials, which are kept.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron.mpu.collectives import MAX, all_reduce
from megatron.mpu.parallel_state import Axis
from megatron.ops import kernels
from megatron.ops.cross_entropy import logits_gradient, row_losses


def own_tokens(columns: int, axis: Axis, vocab_size: int) -> tuple[int, int]:
    """The first token that a rank with so many columns scores, and how many are no padding."""
    start = axis.rank * columns
    return start, min(max(vocab_size - start, 0), columns)


def losses_of_all(
    statistics: torch.Tensor, axis: Axis
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, maxima and sums of exponentials over the whole vocabulary, [n] each.

    ``statistics`` [3, n] are those of this rank's columns; they are used up.
    """
    maxima, totals, _ = statistics
    if axis.size > 1:
        maxima = all_reduce(statistics[0].clone(), axis, MAX)
        totals.mul_((statistics[0] - maxima).exp_())
        # Of the targets' logits, all ranks but one have 0.
        all_reduce(statistics[1:], axis)
    return totals.log() - (statistics[2] - maxima), maxima, totals


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        axis: Axis,
        vocab_size: int,
        overwrite: bool,
    ) -> torch.Tensor:
        # Columns of vocabulary padding take no part: as if their logits were minus infinity.
        start, real = own_tokens(logits.size(-1), axis, vocab_size)
        wide = torch.promote_types(logits.dtype, torch.float32)
        exponents = logits.detach().to(wide, copy=not overwrite)
        exponents[..., real:] = float("-inf")
        maximum = all_reduce(exponents.amax(dim=-1), axis, MAX)
        exponents -= maximum.unsqueeze(-1)

        local = target - start
        elsewhere = (local < 0) | (local >= real)
        local = local.masked_fill(elsewhere, 0)
        target_logit = exponents.gather(-1, local.unsqueeze(-1)).squeeze(-1)
        target_logit = target_logit.masked_fill(elsewhere, 0.0)

        exponents.exp_()
        total, target_logit = all_reduce(torch.stack([exponents.sum(-1), target_logit]), axis)
        ctx.save_for_backward(exponents, total, local, elsewhere)
        ctx.dtype, ctx.overwrite = logits.dtype, overwrite
        return total.log() - target_logit

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        exponents, total, local, elsewhere = ctx.saved_tensors
        # d loss / d z_v = softmax(z)_v - [v = y]; a second backward pass would find its input gone,
        # and autograd says so.
        grad_logits = exponents if ctx.overwrite else exponents.clone()
        grad_logits *= (grad / total).unsqueeze(-1)
        at_target = -grad.masked_fill(elsewhere, 0.0)
        grad_logits.scatter_add_(-1, local.unsqueeze(-1), at_target.unsqueeze(-1))
        return grad_logits.to(ctx.dtype), None, None, None, None


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        axis: Axis,
        vocab_size: int,
        overwrite: bool,
    ) -> torch.Tensor:
        rows = logits.detach().reshape(target.numel(), logits.size(-1))
        targets = target.reshape(-1)
        ctx.tokens = own_tokens(logits.size(-1), axis, vocab_size)
        ctx.shape, ctx.overwrite = logits.shape, overwrite
        loss, statistics = row_losses(rows, targets, *ctx.tokens)
        maxima, totals, _ = statistics
        if axis.size > 1:
            loss, maxima, totals = losses_of_all(statistics, axis)
        ctx.save_for_backward(rows, targets, maxima, totals)
        return loss.view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        rows, targets, maxima, totals = ctx.saved_tensors
        gradient = logits_gradient(
            *(rows, targets, maxima, totals, grad.reshape(-1), *ctx.tokens),
            overwrite=ctx.overwrite,
        )
        return gradient.view(ctx.shape), None, None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    axis: Axis,
    vocab_size: int,
    *,
    overwrite: bool = False,
) -> torch.Tensor:
    """Negative log-likelihood of each target.

    Args:
        logits: [..., padded vocabulary / size], this rank's columns; computed in at least float32.
        target: i64[...], global token numbers below ``vocab_size``.
        axis: the tensor axis.
        vocab_size: true size of the vocabulary, without padding.
        overwrite: use the memory of ``logits``, which nobody else may need, for the gradient:
            nothing as large is allocated. There can be one backward pass.

    Returns:
        [...], in nats, in float32 or wider.
    """
    function = _FusedCrossEntropy if kernels.active(logits) else _VocabParallelCrossEntropy
    return function.apply(logits, target, axis, vocab_size, overwrite)
