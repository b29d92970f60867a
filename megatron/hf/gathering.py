"""Whole tensors, made of the parts of them that the ranks of a model hold.

Every rank calls these functions in the same order. A tensor is first put together on all tensor
ranks of the stage that owns it, and then goes to the other stages, or to the first one alone. No
rank has more than one whole tensor in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mpu import ParallelState, ShardSpec
from megatron.mpu.collectives import all_gather, broadcast
from megatron.mpu.staging import staged
from megatron.mpu.watchdog import waiting


@dataclass(frozen=True)
class Held:
    """A global tensor: what it is, and the pipeline stage that owns it."""

    stage: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Part:
    """This rank's part of a global tensor."""

    spec: ShardSpec
    tensor: Tensor


def held_by_stages(parts: Iterable[Part], state: ParallelState) -> dict[str, Held]:
    """The global tensors of all stages by name; of copies the owner counts."""
    stage = state.pipeline.rank
    own = {
        part.spec.name: Held(stage, part.spec.shape, part.tensor.dtype)
        for part in parts
        if part.spec.tied_to is None
    }
    every: list[Any] = [own]
    if state.pipeline.size > 1:
        every = [None] * state.pipeline.size
        with waiting("the stages of the pipeline to say which tensors they hold"):
            dist.all_gather_object(every, own, group=state.pipeline.group)
    # The first stage that has a tensor owns it.
    return {name: held for stage in reversed(every) for name, held in stage.items()}


def whole_tensors(
    names: Iterable[str],
    parts: Mapping[str, Part],
    held: Mapping[str, Held],
    state: ParallelState,
    *,
    everywhere: bool,
) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, whole: on every rank, or else on the first rank of the model alone.

    A rank that is not given a tensor gets an empty one in its place.
    """
    for name in names:
        owner = held[name]
        whole = torch.empty(0, dtype=owner.dtype)
        if owner.stage == state.pipeline.rank:
            whole = _over_tensor_ranks(parts[name], state)
        yield name, _over_stages(whole, owner, state, everywhere)


def true_part(part: Part, state: ParallelState) -> Tensor:
    """The part without the padding of a vocabulary; a view."""
    spec, axis = part.spec, state.tensor
    if spec.padded is None:
        return part.tensor
    boxes = spec.rectangles(axis.rank, axis.size)
    if not boxes:
        assert spec.dim is not None
        return part.tensor.narrow(spec.dim, 0, 0)
    (box,) = boxes  # nothing that is padded has blocks
    return part.tensor[box.local_slices]


def _over_tensor_ranks(part: Part, state: ParallelState) -> Tensor:
    spec, axis = part.spec, state.tensor
    if spec.dim is None:
        return part.tensor
    if axis.size == 1:
        return true_part(part, state)
    locals_ = all_gather(part.tensor.unsqueeze(0), axis)
    whole = part.tensor.new_empty(spec.shape)
    for rank, local in enumerate(locals_):
        for box in spec.rectangles(rank, axis.size):
            whole[box.global_slices] = local[box.local_slices]
    return whole


def _over_stages(whole: Tensor, owner: Held, state: ParallelState, everywhere: bool) -> Tensor:
    axis = state.pipeline
    if axis.size == 1 or (not everywhere and owner.stage == 0):
        return whole
    if axis.rank == owner.stage:
        whole = whole.contiguous()
    elif everywhere or axis.rank == 0:
        whole = torch.empty(owner.shape, dtype=owner.dtype, device=state.device)
    if everywhere:
        return broadcast(whole, axis, owner.stage)
    if state.tensor.rank == 0 and axis.rank in (0, owner.stage):
        is_sent = axis.rank != 0
        what = f"a whole tensor of stage {owner.stage} on its way to the first"
        with waiting(what), staged(whole, axis.group, is_sent=is_sent) as exchanged:
            if is_sent:
                dist.send(exchanged, axis.ranks[0], group=axis.group)
            else:
                dist.recv(exchanged, axis.ranks[owner.stage], group=axis.group)
    return whole
