"""Activations that are computed again in the backward pass instead of being held.

Of a recomputed part the forward pass keeps the inputs alone; the backward pass runs it once more,
from the same random numbers, and differentiates that (arXiv 1604.06174). The result is bitwise that
of a run that holds everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron.mpu.collectives import all_gather
from megatron.mpu.parallel_state import Axis
from megatron.mpu.random import RandomStreams

Part = Callable[..., torch.Tensor]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        part: Part,
        streams: RandomStreams,
        split_axis: Axis | None,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        ctx.part, ctx.streams, ctx.split_axis = part, streams, split_axis
        ctx.snapshot = streams.snapshot()
        ctx.shape = inputs[0].shape
        first = inputs[0] if split_axis is None else _own_share(inputs[0], split_axis)
        ctx.save_for_backward(first, *inputs[1:])
        return part(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        first, *others = ctx.saved_tensors
        if ctx.split_axis is not None:
            first = all_gather(first, ctx.split_axis).view(ctx.shape)
        wanted = ctx.needs_input_grad[3:]
        inputs = [
            tensor.detach().requires_grad_(want)
            for tensor, want in zip((first, *others), wanted, strict=True)
        ]
        with torch.enable_grad(), ctx.streams.replayed(ctx.snapshot):
            output = ctx.part(*inputs)
        torch.autograd.backward(output, grad_output)
        return None, None, None, *(tensor.grad for tensor in inputs)


def recompute(
    part: Part,
    *inputs: torch.Tensor,
    streams: RandomStreams,
    split_axis: Axis | None = None,
) -> torch.Tensor:
    """``part(*inputs)``, holding only ``inputs`` for the backward pass.

    Args:
        part: makes one tensor from tensors; it must not keep state between calls.
        inputs: those that are to get a gradient must be given here, not captured.
        streams: where the part's dropout draws from.
        split_axis: holds the first input, equal on its ranks, split over them.
    """
    if split_axis is not None and (split_axis.size == 1 or inputs[0].numel() % split_axis.size):
        split_axis = None
    # Parameters that the part uses are no inputs: a graph is needed even where none wants one.
    if torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in inputs):
        inputs = (inputs[0].detach().requires_grad_(), *inputs[1:])
    return _Recomputed.apply(part, streams, split_axis, *inputs)


def _own_share(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's part of the elements, in memory of its own."""
    return tensor.flatten().chunk(axis.size)[axis.rank].clone()
