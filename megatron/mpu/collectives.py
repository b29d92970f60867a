"""Collectives over an axis, and their places in the autograd graph.

A tensor-parallel block is entered through :func:`copy_to_tensor_region` and left through
:func:`reduce_from_tensor_region`; they are each other's adjoints (arXiv 1909.08053, figure 3,
operators f and g). Over an axis of size 1 nothing is communicated and nothing is recorded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron.mpu.parallel_state import Axis

SUM = dist.ReduceOp.SUM
MAX = dist.ReduceOp.MAX


def all_reduce(tensor: torch.Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = SUM) -> torch.Tensor:
    """Reduce ``tensor`` over the axis in place and return it."""
    if axis.size > 1:
        dist.all_reduce(tensor, op=op, group=axis.group)
    return tensor


def start_all_reduce(
    tensor: torch.Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = SUM
) -> dist.Work | None:
    """Begin to reduce ``tensor`` in place; None where there is nothing to wait for."""
    if axis.size == 1:
        return None
    return dist.all_reduce(tensor, op=op, group=axis.group, async_op=True)


def broadcast(tensor: torch.Tensor, axis: Axis, source: int = 0) -> torch.Tensor:
    """Copy the tensor of the axis' ``source``-th rank to all of them, in place."""
    if axis.size > 1:
        dist.broadcast(tensor, src=axis.ranks[source], group=axis.group)
    return tensor


def all_gather_last_dim(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[..., n] on each rank -> [..., n * size], in the axis' order."""
    if axis.size == 1:
        return tensor
    pieces = [torch.empty_like(tensor) for _ in range(axis.size)]
    dist.all_gather(pieces, tensor.contiguous(), group=axis.group)
    return torch.cat(pieces, dim=-1)


def own_piece(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[..., n * size] -> this rank's [..., n]."""
    return tensor.chunk(axis.size, dim=-1)[axis.rank]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        # A clone, since the same gradient may also flow elsewhere.
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.mark_dirty(tensor)
        return all_reduce(tensor, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return all_gather_last_dim(tensor, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return own_piece(grad, ctx.axis).contiguous(), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return own_piece(tensor, axis).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather_last_dim(grad, ctx.axis), None


def copy_to_tensor_region(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Identity; the gradient is summed over the axis."""
    return tensor if axis.size == 1 else _Copy.apply(tensor, axis)


def reduce_from_tensor_region(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum over the axis, in place; the gradient passes unchanged."""
    return tensor if axis.size == 1 else _Reduce.apply(tensor, axis)


def gather_from_tensor_region(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[..., n] -> [..., n * size] along the last dim; each rank keeps its piece of the gradient."""
    return tensor if axis.size == 1 else _Gather.apply(tensor, axis)


def scatter_to_tensor_region(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[..., n * size] -> this rank's [..., n]; the gradient's pieces are gathered."""
    return tensor if axis.size == 1 else _Scatter.apply(tensor, axis)
