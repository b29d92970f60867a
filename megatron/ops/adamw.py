"""AdamW (arXiv 1711.05101) on many flat tensors in one pass (`csrc/cuda/adamw.cu`).

    g  = gradient / divisor
    m' = beta1 m + (1 - beta1) g            v' = beta2 v + (1 - beta2) g^2
    w' = w - lr (decay w + m' / c1 / (sqrt(v' / c2) + eps)),  c = 1 - beta^t

The pass also rounds the new weights to the half-precision parameters that they are masters of. All
that the host would have to wait for, the divisor, the count t, whether to skip, stays a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.ops import kernels
from megatron.ops.multi_tensor import host_table
from megatron.ops.operator import operator


def _kernel(
    step: Tensor,
    skipped: Tensor,
    divisor: Tensor | None,
    weights: Sequence[Tensor],
    rounded: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weight_decays: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    gains = (1.0 - beta1, 1.0 - beta2)
    scale = step.new_empty(2)
    kernels.launch("adamw_count_step", step, skipped, scale, lr, *gains)
    parts = (gradients, exp_avgs, exp_avg_sqs, weights)
    assert all(tensor.dtype == torch.float32 for part in parts for tensor in part)
    for dtype in dict.fromkeys(tensor.dtype for tensor in rounded):
        rows = [i for i, tensor in enumerate(rounded) if tensor.dtype == dtype]
        table = host_table(*([part[i] for i in rows] for part in (*parts, rounded)))
        decays = torch.tensor([lr * weight_decays[i] for i in rows], device="cpu")
        kernels.launch(
            "adamw_update",
            *(scale, skipped, divisor, table, decays, len(rows)),
            *(*gains, eps, dtype),
        )


def _twin(
    step: Tensor,
    skipped: Tensor,
    divisor: Tensor | None,
    weights: Sequence[Tensor],
    rounded: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weight_decays: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    step.add_((~skipped).to(step.dtype))
    count = step.double()
    c1, c2 = 1.0 - beta1**count, 1.0 - beta2**count
    parts = (weights, rounded, gradients, exp_avgs, exp_avg_sqs, weight_decays)
    for w, low, g, m, v, decay in zip(*parts, strict=True):
        slope = g if divisor is None else g / divisor
        mean = beta1 * m + (1.0 - beta1) * slope
        square = beta2 * v + (1.0 - beta2) * slope * slope
        new = w - lr * (decay * w + mean / c1 / ((square / c2).sqrt() + eps))
        for old, value in ((m, mean), (v, square), (w, new)):
            old.copy_(torch.where(skipped, old, value))
        if low.numel():
            low.copy_(torch.where(skipped, low, w.to(low.dtype)))


_adamw = operator(
    "adamw_(Tensor(a!) step, Tensor skipped, Tensor? divisor, Tensor(b!)[] weights,"
    " Tensor(c!)[] rounded, Tensor[] gradients, Tensor(d!)[] exp_avgs, Tensor(e!)[] exp_avg_sqs,"
    " float[] weight_decays, float lr, float beta1, float beta2, float eps) -> ()",
    kernel=_kernel,
    twin=_twin,
)


def adamw_(
    weights: Sequence[Tensor],
    rounded: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weight_decays: Sequence[float],
    *,
    step: Tensor,
    skipped: Tensor,
    divisor: Tensor | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update all weights and moments in place, unless the step is `skipped`.

    Args:
        weights: contiguous, of `step`'s dtype, as gradients and moments are, and equally long.
        rounded: for each tensor of weights the one in half precision that takes their values, or
            None.
        step: how many steps were taken, a scalar that counts this one.
        skipped: bool scalar on the device; where it is true nothing changes.
        divisor: of the gradients, a scalar of `step`'s dtype on the device, or None.
    """
    none = step.new_empty(0)
    lows = [none if low is None else low for low in rounded]
    _adamw(
        *(step, skipped, divisor, weights, lows, gradients, exp_avgs, exp_avg_sqs),
        *(weight_decays, lr, *betas, eps),
    )
