"""A step's gradients: accumulated in flat buffers, summed over the data-parallel ranks.

A step goes like this::

    gradients.zero()
    for every micro-batch: forward, backward     # each adds into the buffers
        gradients.on_last_backward(chunk)        # just before a chunk's last backward
    gradients.finish()

While the last backward runs, each parameter reports that its gradient is complete. Once a bucket
has heard of all of its parameters, its all-reduce starts and runs beside the rest of backward.
:meth:`GradientBuffers.finish` starts what was not started, waits, and adds up the gradients of
tensors that several stages or tensor ranks hold.

Losses are already divided by the global batch's denominators, hence gradients are summed, never
averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.mpu.collectives import all_reduce, start_all_reduce
from megatron.mpu.parallel_state import Axis, ParallelState
from megatron.optimizer.flat_buffer import FlatBuffer, build_flat_buffers, shard_spec


class _Bucket:
    """A slice of a gradient buffer on its way through one step."""

    def __init__(self, gradients: Tensor, parameters: Sequence[nn.Parameter], place: int) -> None:
        self.gradients = gradients
        self.parameters = parameters
        self.place = place  # of its last parameter in the order of backward
        self.missing = len(parameters)


class GradientBuffers:
    """The flat buffers of all chunks of this rank.

    ``bucket_size`` is in elements. Every rank of a data-parallel group launches the same
    collectives in the same order, that of the buckets' expected completion, whatever order the
    gradients really arrive in.
    """

    def __init__(self, chunks: Sequence[nn.Module], state: ParallelState, bucket_size: int) -> None:
        self._state = state
        chunk_of = _chunk_of_parameters(chunks)
        backward_order = list(reversed(chunk_of))
        self.buffers: list[FlatBuffer] = build_flat_buffers(
            backward_order, state.tensor.rank, bucket_size
        )
        self._buckets = _cut_into_buckets(self.buffers, backward_order)
        self._next_bucket = 0
        self._works: list[dist.Work] = []
        self._in_last_backward: set[int] = set()
        self._shared = _find_shared(backward_order, state)
        self._nodes: list[torch.autograd.graph.Node] = []
        self._watch_backward(chunk_of)

    def zero(self) -> None:
        """Begin a step."""
        for buffer in self.buffers:
            buffer.gradients.zero_()
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._next_bucket = 0
        self._in_last_backward.clear()

    def on_last_backward(self, chunk: int) -> None:
        """Say that the next backward of ``chunk`` completes its gradients of this step."""
        self._in_last_backward.add(chunk)

    def finish(self) -> None:
        """Complete the sums over ranks; the buffers then hold the gradients of the global batch."""
        while self._next_bucket < len(self._buckets):
            self._launch_next_bucket()
        for work in self._works:
            work.wait()
        self._works.clear()
        for buffer in self.buffers:
            if buffer.traits.partial:
                all_reduce(buffer.gradients, self._state.tensor)
        for gradient, axis in self._shared:
            all_reduce(gradient, axis)

    def _watch_backward(self, chunk_of: dict[nn.Parameter, int]) -> None:
        bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        for buffer in self.buffers:
            if buffer.accumulates_in_place and self._state.data.size == 1:
                continue  # nothing is left to do when a gradient arrives
            for parameter in buffer.parameters:
                self._watch(parameter, bucket_of[parameter], chunk_of[parameter])

    def _watch(self, parameter: nn.Parameter, bucket: _Bucket, chunk: int) -> None:
        # The node's hook also runs where a layer has added into main_grad by itself and handed
        # autograd no gradient, which hooks on the parameter do not. The node lives only as long
        # as someone holds it.
        function = parameter.expand_as(parameter).grad_fn
        assert function is not None
        node = function.next_functions[0][0]
        assert node is not None
        node.register_hook(partial(self._gradient_arrived, parameter, bucket, chunk))
        self._nodes.append(node)

    def _gradient_arrived(
        self, parameter: nn.Parameter, bucket: _Bucket, chunk: int, *_: object
    ) -> None:
        main_grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]
        if parameter.grad is not None and parameter.dtype != main_grad.dtype:
            main_grad.add_(parameter.grad)
            parameter.grad = None
        if chunk in self._in_last_backward:
            bucket.missing -= 1
            while self._next_bucket_is_complete():
                self._launch_next_bucket()

    def _next_bucket_is_complete(self) -> bool:
        waiting = self._next_bucket < len(self._buckets)
        return waiting and self._buckets[self._next_bucket].missing == 0

    def _launch_next_bucket(self) -> None:
        bucket = self._buckets[self._next_bucket]
        self._next_bucket += 1
        work = start_all_reduce(bucket.gradients, self._state.data)
        if work is not None:
            self._works.append(work)


def _chunk_of_parameters(chunks: Sequence[nn.Module]) -> dict[nn.Parameter, int]:
    """Trained parameters in the order of their creation, each once, with its first chunk."""
    chunk_of: dict[nn.Parameter, int] = {}
    for index, chunk in enumerate(chunks):
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                chunk_of.setdefault(parameter, index)
    return chunk_of


def _cut_into_buckets(
    buffers: Sequence[FlatBuffer], backward_order: Sequence[nn.Parameter]
) -> list[_Bucket]:
    """The buckets of all buffers in the order in which backward should complete them."""
    place = {parameter: index for index, parameter in enumerate(backward_order)}
    buckets = []
    for buffer in buffers:
        for cut in buffer.layout.buckets:
            parameters = buffer.parameters[cut.first : cut.last]
            gradients = buffer.gradients[cut.start : cut.stop]
            buckets.append(_Bucket(gradients, parameters, place[parameters[-1]]))
    return sorted(buckets, key=lambda bucket: bucket.place)


def _find_shared(
    parameters: Sequence[nn.Parameter], state: ParallelState
) -> list[tuple[Tensor, Axis]]:
    """The gradients of tensors that several stages hold, with the ranks to add them up over.

    A copy says what it is tied to, its owner does not know that there are copies. The members of
    an embedding group therefore tell each other what they hold, and each tensor that all of them
    hold, some as a copy, is shared over that group.
    """
    held = {shard_spec(parameter).key: parameter for parameter in parameters}
    copies = {shard_spec(p).key for p in parameters if shard_spec(p).tied_to is not None}
    shared: dict[str, tuple[Tensor, Axis]] = {}
    for axis in (state.embedding, state.position_embedding):
        if axis is None or axis.size == 1:
            continue
        told: list[tuple[set[str], set[str]]] = [(set(), set())] * axis.size
        dist.all_gather_object(told, (set(held), copies), group=axis.group)
        held_by_all = set.intersection(*(names for names, _ in told))
        copied_by_any = set.union(*(names for _, names in told))
        for key in sorted((held_by_all & copied_by_any) - shared.keys()):
            gradient: Tensor = held[key].main_grad  # type: ignore[attr-defined]
            shared[key] = (gradient, axis)
    return list(shared.values())
