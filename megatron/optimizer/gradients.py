"""A step's gradients: accumulated in flat buffers, summed over the ranks that hold a parameter.

A step goes like this::

    gradients.zero()
    for every micro-batch: forward, backward     # each adds into the buffers
        gradients.on_last_backward(chunk)        # just before a chunk's last backward
    gradients.finish()

While the last backward runs, each parameter reports that its gradient is complete. Once a bucket
has heard of all of its parameters, its sum over the data-parallel ranks starts and runs beside the
rest of backward. :meth:`GradientBuffers.finish` starts what was not started, waits, and adds up the
gradients of tensors that several stages or tensor ranks hold: after the sum over the data-parallel
ranks, since each of them may then hold but a part.

Losses are already divided by the global batch's denominators, hence gradients are summed, never
averaged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megatron.mpu.deferral import outstanding
from megatron.mpu.parallel_state import Axis, ParallelState
from megatron.optimizer.buckets import Bucket, cut_into_buckets
from megatron.optimizer.flat_buffer import FlatBuffer, Shard, build_flat_buffers
from megatron.optimizer.reduction import Reduction, StreamedGradients, WholeGradients
from megatron.optimizer.shared import find_shared, sum_together
from megatron.optimizer.weak import weakly


class GradientBuffers:
    """The flat buffers of all chunks of this rank.

    Args:
        bucket_size: elements.
        scattered: each data-parallel rank gets the sums of its shard of every bucket (ZeRO-1).
        streamed: and keeps nothing but these (ZeRO-2); parameters have no ``main_grad`` then.

    Attributes:
        buffers: the parameters and gradients.
        buckets: in the order in which backward completes them.
        shared: the names of the tensors that several stages hold, with the ranks that do.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        state: ParallelState,
        bucket_size: int,
        *,
        scattered: bool = False,
        streamed: bool = False,
    ) -> None:
        chunk_of = _chunk_of_parameters(chunks)
        backward_order = list(reversed(chunk_of))
        self.shared = find_shared(backward_order, state)
        self.buffers: list[FlatBuffer] = build_flat_buffers(
            backward_order,
            state.tensor.rank,
            bucket_size,
            shared=self.shared.keys(),
            shards=state.data.size if scattered or streamed else 1,
            whole_gradients=not streamed,
        )
        self.buckets = cut_into_buckets(self.buffers, backward_order)
        self._reduction: Reduction
        if streamed:
            self._reduction = StreamedGradients(self.buckets, state.data)
        else:
            self._reduction = WholeGradients(
                self.buffers, self.buckets, state.data, scattered=scattered
            )
        self._summed_over = _sums(self.shards, self.shared, state.tensor)
        self._in_last_backward: set[int] = set()
        self._nodes: list[torch.autograd.graph.Node] = []
        self._watch_backward(chunk_of)

    @property
    def shards(self) -> list[Shard]:
        """What this rank gets the sums of, and updates."""
        return self._reduction.shards

    def zero(self) -> None:
        """Begin a step."""
        self._reduction.zero()
        self._in_last_backward.clear()

    def on_last_backward(self, chunk: int) -> None:
        """Say that the next backward of ``chunk`` completes its gradients of this step."""
        self._in_last_backward.add(chunk)

    def finish(self) -> None:
        """Complete the sums; the shards then hold their gradients of the global batch."""
        self._reduction.finish()
        for axis, gradients in self._summed_over:
            sum_together(gradients, axis)

    def _watch_backward(self, chunk_of: dict[nn.Parameter, int]) -> None:
        for bucket in self.buckets:
            if self._reduction.wants(bucket):
                for parameter in bucket.places:
                    self._watch(parameter, bucket, chunk_of[parameter])

    def _watch(self, parameter: nn.Parameter, bucket: Bucket, chunk: int) -> None:
        # The node's hook also runs where a layer has added into main_grad by itself and handed
        # autograd no gradient, which hooks on the parameter do not. The node lives only as long
        # as someone holds it.
        function = parameter.expand_as(parameter).grad_fn
        assert function is not None
        node = function.next_functions[0][0]
        assert node is not None
        # The model holds this call, and must not keep the buffers alive by it.
        arrived = partial(weakly(self._gradient_arrived), parameter, bucket, chunk)
        node.register_hook(arrived)
        self._nodes.append(node)
        # Called when the last of a weight's products has been done that were left for later.
        parameter.completed = arrived  # type: ignore[attr-defined]

    def _gradient_arrived(
        self, parameter: nn.Parameter, bucket: Bucket, chunk: int, *_: object
    ) -> None:
        last = chunk in self._in_last_backward and outstanding(parameter) == 0
        self._reduction.arrived(parameter, bucket, last=last)


def _chunk_of_parameters(chunks: Sequence[nn.Module]) -> dict[nn.Parameter, int]:
    """Trained parameters in the order of their creation, each once, with its first chunk."""
    chunk_of: dict[nn.Parameter, int] = {}
    for index, chunk in enumerate(chunks):
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                chunk_of.setdefault(parameter, index)
    return chunk_of


def _sums(
    shards: Sequence[Shard], shared: dict[str, Axis], tensor: Axis
) -> list[tuple[Axis, list[Tensor]]]:
    """The gradients that have to be summed over some ranks, by these, in everybody's order."""
    partial_sums = [shard.gradients for shard in shards if shard.buffer.traits.partial]
    gradient_of = {shard.buffer.traits.shared: shard.gradients for shard in shards}
    by_axis: dict[Axis, list[Tensor]] = defaultdict(list)
    for key, axis in shared.items():
        by_axis[axis].append(gradient_of[key])
    return [(tensor, partial_sums), *by_axis.items()]
