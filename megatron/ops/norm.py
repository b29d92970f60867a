"""Normalisation over the last dimension, holding its input and a number or two for each row.

    LayerNorm   y = (x - mean) rstd w + b     rstd = 1 / sqrt(variance + epsilon)   arXiv 1607.06450
    RMSNorm     y = x rstd w                  rstd = 1 / sqrt(mean(x^2) + epsilon)  arXiv 1910.07467

The residual stream may be wider than the parameters: y has their format, and x its own. The
gradients of the parameters are found in the same pass as that of x. Forward and backward of
`megatron/ops/fused_norm.py`, where an addition comes first, are here as well.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops import kernels
from megatron.ops.columns import summed
from megatron.ops.compiled import fusable
from megatron.ops.operator import differentiable, operator
from megatron.ops.philox import Draw, kept, threshold
from megatron.ops.precision import widened

# Blocks that the emulator runs in place of a GPU's multiprocessors.
_EMULATED_PROCESSORS = 3


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, in the dtype of ``weight``.

    Source: arXiv 1607.06450.
    """
    if takes(x, weight):
        fused: Tensor = _layer_norm(x, weight, bias, epsilon)[0]
        return fused
    if kernels.choice() == "apex" and x.is_cuda:
        return _apex("layer", x, weight, bias, epsilon)
    return _layer_norm_plain(x, weight, bias, epsilon)


@fusable
def _layer_norm_plain(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    y = F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), epsilon)
    return y.to(weight.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, in the dtype of ``weight``.

    Source: arXiv 1910.07467.
    """
    if takes(x, weight):
        fused: Tensor = _rms_norm(x, weight, epsilon)[0]
        return fused
    if kernels.choice() == "apex" and x.is_cuda:
        return _apex("rms", x, weight, epsilon)
    return _rms_norm_plain(x, weight, epsilon)


@fusable
def _rms_norm_plain(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return _RMSNorm.apply(x, weight, epsilon)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether a kernel takes a stream and parameters of these formats: equal, or one float32."""
    both = kernels.active(x) and kernels.active(weight)
    return both and torch.promote_types(x.dtype, weight.dtype) in (x.dtype, weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = widened(x)
        scale = (exact.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (exact * scale * weight).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normalised = widened(x) * scale
        grad = widened(grad)
        grad_weight = (grad * normalised).flatten(0, -2).sum(dim=0)
        grad = grad * weight
        grad_x = scale * (grad - normalised * (grad * normalised).mean(dim=-1, keepdim=True))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _apex(kind: str, x: Tensor, *parameters: Tensor | float) -> Tensor:
    functional = importlib.import_module("apex.normalization.fused_layer_norm")
    function = getattr(functional, f"mixed_dtype_fused_{kind}_norm_affine")
    *tensors, epsilon = parameters
    y: Tensor = function(x, *tensors, (x.size(-1),), epsilon)
    return y


def forward_kernel(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    epsilon: float,
    probability: float = 0.0,
    key: Tensor | None = None,
    draw: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """total, y, mean and rstd of `norm_after_add`, or without ``residual`` of a norm of x alone.

    Then there is no total, and without ``norm_bias`` no mean: such a result has no elements.
    """
    x, weight = x.contiguous(), weight.contiguous()
    bias, residual, norm_bias = _contiguous(bias), _contiguous(residual), _contiguous(norm_bias)
    stream = x if residual is None else residual
    total = x.new_empty(0) if residual is None else torch.empty_like(residual)
    y = torch.empty_like(x, dtype=weight.dtype)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = rstd.new_empty(0) if norm_bias is None else torch.empty_like(rstd)
    if x.numel():
        kernels.launch(
            "norm_forward",
            *(x, bias, residual, total, weight, norm_bias, y),
            *(None if norm_bias is None else mean, rstd),
            *_dropout(probability, key, draw),
            *(epsilon, rstd.numel(), x.size(-1), stream.dtype, weight.dtype),
        )
    return total, y, mean, rstd


def forward_twin(
    stream: Tensor, weight: Tensor, norm_bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd; no mean, that is one without elements, without ``norm_bias``."""
    deviation = wide = widened(stream)
    mean = wide.new_empty(0)
    if norm_bias is not None:
        mean = wide.mean(dim=-1)
        deviation = wide - mean.unsqueeze(-1)
    rstd = (deviation.square().mean(dim=-1) + epsilon).rsqrt()
    y = deviation * rstd.unsqueeze(-1) * weight
    y = y if norm_bias is None else y + norm_bias
    return y.to(weight.dtype).contiguous(), mean, rstd


def backward_kernel(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    added: bool = False,
    bias: bool = False,
    probability: float = 0.0,
    key: Tensor | None = None,
    draw: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the stream, of what was added to it, and of the parameters.

    Returns:
        [..., h] in the stream's format; [..., h] in the weight's, or no elements where nothing
        was ``added`` or the gradient is the stream's; [2 or 3, h] of weight, of norm_bias unless
        there is no ``mean``, of ``bias``.
    """
    grad, total, weight = grad.contiguous(), total.contiguous(), weight.contiguous()
    grad_total = _contiguous(grad_total)
    grad_residual = torch.empty_like(total)
    own = _has_own_gradient(added, probability, total, weight)
    grad_x = torch.empty_like(total, dtype=weight.dtype) if own else weight.new_empty(0)
    rows, columns = rstd.numel(), total.size(-1)
    count = _count(mean, bias)
    if not total.numel():
        return grad_residual, grad_x, weight.new_zeros((count, columns))
    blocks = min(rows, _processors(total.device))
    parts = rstd.new_empty((blocks, count * columns))
    kernels.launch(
        "norm_backward",
        *(grad, grad_total, total, mean, rstd, weight, grad_residual, grad_x if own else None),
        *(parts, rstd.new_empty((rows, 2))),
        *_dropout(probability, key, draw),
        *(added, bias, blocks, rows, columns, total.dtype, weight.dtype),
    )
    return grad_residual, grad_x, summed(parts, weight.dtype).view(count, columns)


def backward_twin(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    added: bool = False,
    bias: bool = False,
    probability: float = 0.0,
    key: Tensor | None = None,
    draw: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward_kernel`."""
    wide, scale = widened(grad), rstd.unsqueeze(-1)
    centred = widened(total) if mean is None else widened(total) - mean.unsqueeze(-1)
    normalised = centred * scale
    sums = [wide * normalised] if mean is None else [wide * normalised, wide]
    g = wide * weight
    inner = g - normalised * (g * normalised).mean(dim=-1, keepdim=True)
    if mean is not None:
        inner = inner - g.mean(dim=-1, keepdim=True)
    grad_residual = grad_x = inner * scale if grad_total is None else inner * scale + grad_total
    if key is not None:
        stays = kept(Draw(key, draw), total.shape, probability)
        grad_x = torch.where(stays, grad_residual / (1.0 - probability), 0.0)
    if bias:
        sums.append(grad_x)
    parameters = torch.stack([each.flatten(0, -2).sum(dim=0) for each in sums])
    if not _has_own_gradient(added, probability, total, weight):
        grad_x = weight.new_empty(0)
    return (
        grad_residual.to(total.dtype).contiguous(),
        grad_x.to(weight.dtype).contiguous(),
        parameters.to(weight.dtype),
    )


def _has_own_gradient(added: bool, probability: float, total: Tensor, weight: Tensor) -> bool:
    return added and (probability > 0.0 or total.dtype != weight.dtype)


def _count(mean: Tensor | None, bias: bool) -> int:
    return 1 + (mean is not None) + bias


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _dropout(
    probability: float, key: Tensor | None, draw: int
) -> tuple[Tensor | None, int, int, float]:
    if key is None:
        return None, 0, 0, 1.0
    return key, draw, threshold(probability), 1.0 / (1.0 - probability)


def _processors(device: torch.device) -> int:
    return _EMULATED_PROCESSORS if device.type == "cpu" else _multiprocessors(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _layer_norm_kernel(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    return forward_kernel(x, None, None, weight, bias, epsilon)[1:]


def _rms_norm_kernel(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    _, y, _, rstd = forward_kernel(x, None, None, weight, None, epsilon)
    return y, rstd


def _rms_norm_twin(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = forward_twin(x, weight, None, epsilon)
    return y, rstd


def _backward_kernel(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x, _, grad_parameters = backward_kernel(grad, None, x, weight, mean, rstd)
    return grad_x, grad_parameters


def _backward_twin(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x, _, grad_parameters = backward_twin(grad, None, x, weight, mean, rstd)
    return grad_x, grad_parameters


_layer_norm = operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float epsilon) -> (Tensor, Tensor, Tensor)",
    kernel=_layer_norm_kernel,
    twin=forward_twin,
)
_rms_norm = operator(
    "rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    kernel=_rms_norm_kernel,
    twin=_rms_norm_twin,
)
_backward = operator(
    "norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor? mean, Tensor rstd)"
    " -> (Tensor, Tensor)",
    kernel=_backward_kernel,
    twin=_backward_twin,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, *_ = inputs
    statistics = output[1:]
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(x, weight, *statistics)


def _differentiate_layer_norm(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_x, (grad_weight, grad_bias) = _backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight, grad_bias, None


def _differentiate_rms_norm(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    grad_x, (grad_weight,) = _backward(grad, x, weight, None, rstd)
    return grad_x, grad_weight, None


differentiable("layer_norm", _setup, _differentiate_layer_norm)
differentiable("rms_norm", _setup, _differentiate_rms_norm)
