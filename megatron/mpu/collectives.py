"""Collectives over an axis, and their places in the autograd graph.

A tensor-parallel block is entered through :func:`copy_to_tensor_region` and left through
:func:`reduce_from_tensor_region`; they are each other's adjoints (arXiv 1909.08053, figure 3,
operators f and g). With sequence parallelism the block is entered by an all-gather along the
sequence and left by a reduce-scatter, which are adjoints, too, and together move no more than one
all-reduce (arXiv 2205.05198, section 4.2.2). Over an axis of size 1 nothing is communicated and
nothing is recorded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron.mpu import direct
from megatron.mpu.direct import Pending, wait_for
from megatron.mpu.parallel_state import Axis
from megatron.mpu.staging import goes_through_host, on_host, staged
from megatron.mpu.watchdog import waiting

SUM = dist.ReduceOp.SUM
MAX = dist.ReduceOp.MAX

# PyTorch has renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(tensor: torch.Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = SUM) -> torch.Tensor:
    """Reduce ``tensor`` over the axis in place and return it."""
    if axis.size > 1:
        what = wait_for("an all-reduce", axis)
        with waiting(what), staged(tensor, axis.group) as exchanged:
            dist.all_reduce(exchanged, op=op, group=axis.group)
    return tensor


def start_all_reduce(
    tensor: torch.Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = SUM
) -> Pending:
    """Begin to reduce ``tensor`` in place."""
    if axis.size == 1:
        return Pending(tensor)
    what = wait_for("an all-reduce", axis)
    if goes_through_host(tensor, axis.group):
        host = on_host(tensor)
        work = dist.all_reduce(host, op=op, group=axis.group, async_op=True)
        return Pending(tensor, [work], what=what, finish=lambda: tensor.detach().copy_(host))
    work = dist.all_reduce(tensor, op=op, group=axis.group, async_op=True)
    return Pending(tensor, [work], what=what)


def broadcast(tensor: torch.Tensor, axis: Axis, source: int = 0) -> torch.Tensor:
    """Copy the tensor of the axis' ``source``-th rank to all of them, in place."""
    if axis.size > 1:
        what = wait_for(f"a broadcast of rank {axis.ranks[source]}", axis)
        is_sent = axis.rank == source
        with waiting(what), staged(tensor, axis.group, is_sent=is_sent) as exchanged:
            dist.broadcast(exchanged, src=axis.ranks[source], group=axis.group)
    return tensor


def start_all_gather(tensor: torch.Tensor, axis: Axis, out: torch.Tensor | None = None) -> Pending:
    """Begin to put the ranks' tensors [n, ...] one behind the other into [n * size, ...].

    ``out``, contiguous, takes the result where it is given; ``tensor`` may be this rank's part
    of it.
    """
    if out is None:
        out = tensor.new_empty((tensor.size(0) * axis.size, *tensor.shape[1:]))
    tensor = tensor.contiguous()
    if axis.size == 1:
        return Pending(out.copy_(tensor) if out.data_ptr() != tensor.data_ptr() else out)
    if direct.is_better(axis):
        return direct.start_all_gather(tensor, axis, out)
    work = _all_gather(out, tensor, group=axis.group, async_op=True)
    return Pending(out, [work], what=wait_for("an all-gather", axis), held=tensor)


def start_reduce_scatter(
    tensor: torch.Tensor, axis: Axis, out: torch.Tensor | None = None
) -> Pending:
    """Begin to sum the ranks' tensors [n * size, ...] and give each rank its [n, ...] of the sum.

    ``out``, contiguous, takes the result where it is given; it may be this rank's part of
    ``tensor``, which is used up.
    """
    if out is None:
        out = tensor.new_empty((tensor.size(0) // axis.size, *tensor.shape[1:]))
    tensor = tensor.contiguous()
    if axis.size == 1:
        return Pending(out.copy_(tensor) if out.data_ptr() != tensor.data_ptr() else out)
    if direct.is_better(axis):
        return direct.start_reduce_scatter(tensor, axis, out)
    work = _reduce_scatter(out, tensor, group=axis.group, async_op=True)
    return Pending(out, [work], what=wait_for("a reduce-scatter", axis), held=tensor)


def all_gather(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[n, ...] on each rank -> [n * size, ...], in the axis' order."""
    return tensor if axis.size == 1 else start_all_gather(tensor, axis).wait()


def reduce_scatter(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[n * size, ...] on each rank -> this rank's [n, ...] of the sum."""
    return tensor if axis.size == 1 else start_reduce_scatter(tensor, axis).wait()


def all_gather_last_dim(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[..., n] on each rank -> [..., n * size], in the axis' order."""
    if axis.size == 1:
        return tensor
    pieces = all_gather(tensor.unsqueeze(0), axis)
    return pieces.movedim(0, -2).flatten(-2)


def own_piece(tensor: torch.Tensor, axis: Axis, dim: int = -1) -> torch.Tensor:
    """This rank's part of ``tensor`` cut along ``dim``: [..., n * size] -> [..., n]."""
    return tensor.chunk(axis.size, dim=dim)[axis.rank]


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


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, whole_gradient: bool) -> torch.Tensor:
        ctx.axis, ctx.whole_gradient = axis, whole_gradient
        return all_gather(tensor, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.whole_gradient:
            return own_piece(grad, ctx.axis, dim=0).contiguous(), None, None
        return reduce_scatter(grad, ctx.axis), None, None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return reduce_scatter(tensor, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather(grad, ctx.axis), None


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


def gather_from_sequence_region(
    tensor: torch.Tensor, axis: Axis, *, whole_gradient: bool
) -> torch.Tensor:
    """[s / size, ...] -> [s, ...].

    ``whole_gradient``: every rank computes the same with the result, and so has the whole of its
    gradient, not a term of it.
    """
    return tensor if axis.size == 1 else _GatherSequence.apply(tensor, axis, whole_gradient)


def reduce_scatter_to_sequence_region(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[s, ...] -> this rank's [s / size, ...] of the sum; the gradient's pieces are gathered."""
    return tensor if axis.size == 1 else _ReduceScatterSequence.apply(tensor, axis)
