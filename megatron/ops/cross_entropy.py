"""Cross entropy of rows of logits, in one pass over them in each direction.

Of logits z [n, v] the first ``real`` columns count; they are the tokens from ``start`` on. A row of
them is described by three numbers, from which the loss of its target y follows, and the gradient:

    m = max_v z_v,  s = sum_v exp(z_v - m),  z_y         loss = log(s) - (z_y - m)
    d loss / d z_v = exp(z_v - m) / s - [v = y]

Where the columns are a rank's part of the vocabulary, the numbers of all ranks' parts make those of
the whole (`megatron/mpu/cross_entropy.py`). The gradient may take the place of the logits, the
largest tensor of a step; no copy of these in a wider format is made by the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops import kernels
from megatron.ops.operator import operator
from megatron.ops.precision import widened

# The maximum of no logits at all; as `csrc/cuda/cross_entropy.cu` has it.
_LOWEST = -1e38


def _forward_kernel(
    logits: Tensor, targets: Tensor, start: int, real: int
) -> tuple[Tensor, Tensor]:
    logits, targets = _in_rows(logits), targets.contiguous()
    rows = logits.size(0)
    loss = logits.new_empty(rows, dtype=torch.float32)
    statistics = logits.new_empty((3, rows), dtype=torch.float32)
    if rows:
        kernels.launch(
            "cross_entropy_forward",
            *(logits, targets, loss, statistics),
            *(rows, logits.stride(0), start, real, logits.dtype),
        )
    return loss, statistics


def _forward_twin(logits: Tensor, targets: Tensor, start: int, real: int) -> tuple[Tensor, Tensor]:
    z = widened(logits[:, :real])
    maximum = z.amax(1).clamp(min=_LOWEST) if real else z.new_full((z.size(0),), _LOWEST)
    total = (z - maximum[:, None]).exp_().sum(1)
    column, elsewhere = _own(targets, start, real)
    at_target = torch.zeros_like(total)
    if real:
        at_target = z.gather(1, column).squeeze(1).masked_fill(elsewhere, 0.0)
    return total.log() - (at_target - maximum), torch.stack((maximum, total, at_target))


# What the gradient's operators take behind the logits: `_gradient` names it.


def _backward_kernel(logits: Tensor, *of_rows: Any) -> Tensor:
    logits = _in_rows(logits)
    to = logits.new_empty(logits.shape)
    _launch_backward(to, logits, *of_rows)
    return to


def _overwriting_kernel(logits: Tensor, *of_rows: Any) -> None:
    rows = _in_rows(logits)
    _launch_backward(rows, rows, *of_rows)
    if rows is not logits:
        logits.copy_(rows)


def _launch_backward(
    to: Tensor,
    logits: Tensor,
    targets: Tensor,
    maxima: Tensor,
    totals: Tensor,
    grads: Tensor,
    start: int,
    real: int,
) -> None:
    if logits.numel() == 0:
        return
    grads = grads.to(torch.float32)  # whatever its stride, 0 too
    kernels.launch(
        "cross_entropy_backward",
        *(logits, targets.contiguous(), maxima.contiguous(), totals.contiguous(), grads, to),
        *(*logits.shape, logits.stride(0), grads.stride(0), to.stride(0)),
        *(start, real, logits.dtype),
    )


def _backward_twin(logits: Tensor, *of_rows: Any) -> Tensor:
    gradient = _gradient(logits, *of_rows)
    return F.pad(gradient, (0, logits.size(1) - gradient.size(1))).to(logits.dtype)


def _overwriting_twin(logits: Tensor, *of_rows: Any) -> None:
    gradient = _gradient(logits, *of_rows)
    logits[:, : gradient.size(1)] = gradient
    logits[:, gradient.size(1) :] = 0.0


def _gradient(
    logits: Tensor,
    targets: Tensor,
    maxima: Tensor,
    totals: Tensor,
    grads: Tensor,
    start: int,
    real: int,
) -> Tensor:
    """[n, real], in at least float32; zeros in rows whose loss has gradient 0."""
    z = widened(logits[:, :real])
    gradient = (z - maxima[:, None]).exp_().mul_((grads / totals)[:, None])
    column, elsewhere = _own(targets, start, real)
    if real:
        at_target = -grads.masked_fill(elsewhere, 0.0).to(z.dtype)
        gradient.scatter_add_(1, column, at_target[:, None])
    return gradient.masked_fill_((grads == 0.0)[:, None], 0.0)


def _own(targets: Tensor, start: int, real: int) -> tuple[Tensor, Tensor]:
    """Each target's column i64[n, 1], 0 where it has none, and bool[n], which have none."""
    column = targets - start
    elsewhere = (column < 0) | (column >= real)
    return column.masked_fill(elsewhere, 0)[:, None], elsewhere


def _in_rows(logits: Tensor) -> Tensor:
    """The logits with the columns of a row side by side."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


_forward = operator(
    "cross_entropy_forward(Tensor logits, Tensor targets, int start, int real) -> (Tensor, Tensor)",
    kernel=_forward_kernel,
    twin=_forward_twin,
)
_BACKWARD = "Tensor targets, Tensor maxima, Tensor totals, Tensor grads, int start, int real"
_backward = operator(
    f"cross_entropy_backward(Tensor logits, {_BACKWARD}) -> Tensor",
    kernel=_backward_kernel,
    twin=_backward_twin,
)
_overwriting = operator(
    f"cross_entropy_backward_(Tensor(a!) logits, {_BACKWARD}) -> ()",
    kernel=_overwriting_kernel,
    twin=_overwriting_twin,
)


def row_losses(logits: Tensor, targets: Tensor, start: int, real: int) -> tuple[Tensor, Tensor]:
    """What the loss of each row follows from, and the loss where nobody has other columns.

    Args:
        logits: [n, v], of which the first ``real`` columns count.
        targets: i64[n], numbers of tokens; those of the columns begin at ``start``.

    Returns:
        The loss [n] in nats; and the statistics [3, n]: maxima, sums of exponentials under them,
        and logits of the targets, 0 where a target is not among the columns. In float32 or wider.
    """
    return _forward(logits, targets, start, real)


def logits_gradient(
    logits: Tensor,
    targets: Tensor,
    maxima: Tensor,
    totals: Tensor,
    grads: Tensor,
    start: int,
    real: int,
    *,
    overwrite: bool,
) -> Tensor:
    """The gradient of the logits [n, v], in their format; zeros in columns that do not count.

    Args:
        logits, targets, start, real: see :func:`row_losses`.
        maxima, totals: [n], of the whole vocabulary.
        grads: [n], the gradients of the losses; a row whose gradient is 0 is not read.
        overwrite: put the result in the place of the logits.
    """
    if not overwrite:
        return _backward(logits, targets, maxima, totals, grads, start, real)
    _overwriting(logits, targets, maxima, totals, grads, start, real)
    # Whoever has saved the logits for a backward pass is told that they are gone.
    torch.autograd.graph.increment_version(logits)
    return logits
