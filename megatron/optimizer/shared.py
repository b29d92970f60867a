"""Tensors that several pipeline stages hold, and the sums of their gradients.

The word embedding is used by the first and the last stage, position embeddings by the first of an
encoder and of a decoder, a table of relative positions by all. A copy says what it is tied to; its
owner does not know that there are copies, until the ranks that may hold some have told each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.mpu.collectives import all_reduce
from megatron.mpu.parallel_state import Axis, ParallelState
from megatron.optimizer.flat_buffer import shard_spec

Names = tuple[set[str], set[str]]


def find_shared(parameters: Sequence[nn.Parameter], state: ParallelState) -> dict[str, Axis]:
    """The names of the tensors that several stages hold, with the ranks to add them up over.

    A tensor that all members of a group hold, some of them as a copy, is shared over the group.
    The order of the names is the same on all members. Larger groups come first, because what all
    stages hold is also held by the first and the last. A collective of each group.
    """
    own = names(parameters)
    shared: dict[str, Axis] = {}
    for axis in (state.pipeline, state.embedding, state.position_embedding):
        if axis is None or axis.size == 1:
            continue
        told: list[Names] = [(set(), set())] * axis.size
        dist.all_gather_object(told, own, group=axis.group)
        held_by_all = set.intersection(*(held for held, _ in told))
        copied_by_any = set.union(*(copies for _, copies in told))
        for key in sorted((held_by_all & copied_by_any) - shared.keys()):
            shared[key] = axis
    return shared


def names(parameters: Iterable[nn.Parameter]) -> Names:
    """What a rank tells the others: the tensors that it holds, and which of them are copies."""
    specs = [shard_spec(parameter) for parameter in parameters]
    return {spec.key for spec in specs}, {spec.key for spec in specs if spec.tied_to is not None}


def sum_together(tensors: Sequence[Tensor], axis: Axis) -> None:
    """Sum each of the flat ``tensors`` over the axis in place, by one all-reduce."""
    if axis.size == 1 or not tensors:
        return
    if len(tensors) == 1:
        all_reduce(tensors[0], axis)
        return
    joined = all_reduce(torch.cat(list(tensors)), axis)
    parts = joined.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part)
