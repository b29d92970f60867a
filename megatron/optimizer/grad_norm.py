"""Norms over all parameters of the model, every tensor counted once.

A float32 sum over tens of millions of squares loses three digits. The norms of short rows are
exact to rounding, and there are few enough rows to combine them in float64; both together run at
the speed of memory. The kernel (`csrc/cuda/multi_tensor.cu`) goes over to float64 after a few
squares already, and takes all tensors at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor, nn

from megatron.mpu.collectives import all_reduce
from megatron.mpu.parallel_state import Axis, ParallelState
from megatron.ops import kernels, multi_tensor
from megatron.optimizer.flat_buffer import shard_spec
from megatron.optimizer.layout import BUCKET_MULTIPLE


def sum_of_squares(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Of all elements of this rank's ``tensors``, a float64 scalar on ``device``.

    The tensors are flat, [n x 1024], on ``device``, in float32 or float64. Nothing waits for the
    device. The result is not finite where any element is not.
    """
    tensors = list(tensors)
    if tensors and all(kernels.active(tensor) for tensor in tensors):
        return multi_tensor.sum_of_squares(tensors)
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        rows = torch.linalg.vector_norm(tensor.view(-1, BUCKET_MULTIPLE), dim=1)
        squares += rows.double().square().sum()
    return squares


def global_norm(tensors: Iterable[Tensor], axis: Axis, device: torch.device) -> Tensor:
    """The Euclidean norm of all ``tensors`` of all ranks of ``axis``, a float64 scalar.

    As :func:`sum_of_squares`; the result is the same on all ranks.
    """
    return all_reduce(sum_of_squares(tensors, device), axis).sqrt()


def parameter_count(parameters: Iterable[nn.Parameter], state: ParallelState) -> int:
    """Elements of the whole model, without vocabulary padding and without tied copies.

    A collective over ``state.model``; waits for the device.
    """
    own = 0
    for parameter in parameters:
        spec = shard_spec(parameter)
        if spec.counted(state.tensor.rank):
            rectangles = spec.rectangles(state.tensor.rank, state.tensor.size)
            own += sum(prod(rectangle.sizes) for rectangle in rectangles)
    count = torch.tensor(own, dtype=torch.int64, device=state.device)
    all_reduce(count, state.model)
    return int(count.item())
