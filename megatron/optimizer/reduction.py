"""How gradients become sums over the data-parallel ranks.

Every rank of a data-parallel group launches the same collectives in the same order, that of the
buckets' expected completion, whatever order the gradients really arrive in.

:class:`WholeGradients` keeps all gradients of the rank and sums them once per step, during the last
backward: by an all-reduce, or by a reduce-scatter where each rank updates a part of every bucket
(ZeRO-1, arXiv 1910.02054). :class:`StreamedGradients` keeps only the sums of the part that the rank
updates: the gradients of each micro-batch pass through short-lived buckets (ZeRO-2).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron.mpu.collectives import start_all_reduce, start_reduce_scatter
from megatron.mpu.direct import Pending
from megatron.mpu.parallel_state import Axis
from megatron.optimizer.additions import Additions
from megatron.optimizer.buckets import Bucket
from megatron.optimizer.flat_buffer import FlatBuffer, Shard


class Reduction(Protocol):
    """What happens to a step's gradients; ``shards`` are what this rank gets the sums of."""

    shards: list[Shard]

    def zero(self) -> None:
        """Begin a step."""

    def wants(self, bucket: Bucket) -> bool:
        """Whether there is anything to do when a gradient of the bucket arrives."""

    def arrived(self, parameter: nn.Parameter, bucket: Bucket, *, last: bool) -> None:
        """Take a gradient; ``last`` says that no other of this parameter follows in this step."""

    def finish(self) -> None:
        """Complete the sums."""


class WholeGradients:
    """All gradients of the rank, in the buffers, summed over the axis once per step.

    With ``scattered`` each rank gets the sums of its part of every bucket, in place.
    """

    def __init__(
        self,
        buffers: Sequence[FlatBuffer],
        buckets: Sequence[Bucket],
        axis: Axis,
        *,
        scattered: bool,
    ) -> None:
        self._buffers, self._buckets, self._axis = buffers, buckets, axis
        self._scattered = scattered
        if scattered:
            self.shards = [b.shard(b.own(_gradients(b), axis), axis) for b in buckets]
        else:
            self.shards = [
                Shard(buffer, 0, buffer.gradients, 0, len(buffer.parameters))
                for buffer in buffers
                if buffer.gradients is not None
            ]
        self._launched = 0
        self._missing = [set(bucket.places) for bucket in buckets]
        self._place = {bucket: index for index, bucket in enumerate(buckets)}
        self._works: list[Pending] = []
        self._additions = {b: Additions(b.gradients) for b in buffers if b.gradients is not None}

    def zero(self) -> None:
        """Begin a step."""
        for buffer in self._buffers:
            assert buffer.gradients is not None
            buffer.gradients.zero_()
            self._additions[buffer].drop()
        self._missing = [set(bucket.places) for bucket in self._buckets]
        self._launched = 0

    def wants(self, bucket: Bucket) -> bool:
        """Not if autograd has added it into the buffer, and there is no other rank."""
        return self._axis.size > 1 or not bucket.buffer.accumulates_in_place

    def arrived(self, parameter: nn.Parameter, bucket: Bucket, *, last: bool) -> None:
        """Add what autograd could not, and launch the buckets that are complete."""
        if parameter.grad is not None and not bucket.buffer.accumulates_in_place:
            self._add(parameter, bucket, parameter.grad)
            parameter.grad = None
        if last:
            place = self._place[bucket]
            assert place >= self._launched, "a gradient arrived after its bucket was sent"
            self._missing[place].discard(parameter)
            while self._launched < len(self._buckets) and not self._missing[self._launched]:
                self._launch_next()

    def finish(self) -> None:
        """Start what was not started, and wait."""
        while self._launched < len(self._buckets):
            self._launch_next()
        for work in self._works:
            work.wait()
        self._works.clear()

    def _add(self, parameter: nn.Parameter, bucket: Bucket, gradient: Tensor) -> None:
        additions = self._additions[bucket.buffer]
        if additions.takes(gradient):
            additions.add(bucket.start + bucket.places[parameter], gradient)
        else:
            parameter.main_grad.add_(gradient)  # type: ignore[attr-defined]

    def _launch_next(self) -> None:
        bucket = self._buckets[self._launched]
        self._additions[bucket.buffer].flush()
        self._launched += 1
        gradients, axis = _gradients(bucket), self._axis
        if self._scattered:
            work = start_reduce_scatter(gradients, axis, bucket.own(gradients, axis))
        else:
            work = start_all_reduce(gradients, axis)
        self._works.append(work)


def _gradients(bucket: Bucket) -> Tensor:
    assert bucket.buffer.gradients is not None
    return bucket.buffer.gradients[bucket.start : bucket.stop]


class StreamedGradients:
    """The sums of this rank's part alone; each micro-batch's gradients pass bucket by bucket.

    A round is one pass over all buckets, as many as there are micro-batches. A bucket of a round
    is sent once all its parameters have reported that often, and those before it are sent. Where a
    parameter takes no part in some micro-batch, its bucket and those behind it wait until
    :meth:`finish`, adding up: the sum is right, the memory for it is not saved.

    Attributes:
        peak: most elements that lay in buckets at one time.
    """

    def __init__(self, buckets: Sequence[Bucket], axis: Axis) -> None:
        self._buckets, self._axis = buckets, axis
        self.shards = [
            bucket.shard(_zeros(bucket, bucket.size // axis.size), axis) for bucket in buckets
        ]
        self._sums = {b: shard.gradients for b, shard in zip(buckets, self.shards, strict=True)}
        self._limit = 2 * max((bucket.size for bucket in buckets), default=0)
        self._filling: dict[Bucket, Tensor] = {}
        self._sent: deque[tuple[Bucket, Tensor, Pending]] = deque()
        self._arrivals: Counter[nn.Parameter] = Counter()
        self._missing = {bucket: set(bucket.places) for bucket in buckets}  # in its next round
        self._launched = 0
        self.peak = 0

    def zero(self) -> None:
        """Begin a step."""
        for shard in self.shards:
            shard.gradients.zero_()
        self._arrivals.clear()
        self._missing = {bucket: set(bucket.places) for bucket in self._buckets}
        self._launched = 0

    def wants(self, bucket: Bucket) -> bool:
        """Always: autograd's gradients are to be collected."""
        return True

    def arrived(self, parameter: nn.Parameter, bucket: Bucket, *, last: bool) -> None:
        """Move autograd's gradient into its bucket, and send the buckets that are complete."""
        self._arrivals[parameter] += 1
        self._missing[bucket].discard(parameter)
        if parameter.grad is not None:
            place = bucket.places[parameter]
            self._memory(bucket)[place : place + parameter.numel()].add_(parameter.grad.flatten())
            parameter.grad = None
        while not self._missing[self._buckets[self._launched % len(self._buckets)]]:
            self._launch_next()

    def finish(self) -> None:
        """Send what was not sent, in as many rounds as on every rank, and wait."""
        rounds = max(self._arrivals.values(), default=0)
        while self._launched < rounds * len(self._buckets):
            self._launch_next()
        while self._sent:
            self._take_in_oldest()

    def _launch_next(self) -> None:
        completed, index = divmod(self._launched, len(self._buckets))
        bucket = self._buckets[index]
        self._launched += 1
        self._missing[bucket] = {p for p in bucket.places if self._arrivals[p] <= completed + 1}
        memory = self._memory(bucket)
        del self._filling[bucket]
        work = start_reduce_scatter(memory, self._axis, bucket.own(memory, self._axis))
        self._sent.append((bucket, memory, work))

    def _memory(self, bucket: Bucket) -> Tensor:
        """Where the bucket's gradients of this round are collected."""
        if bucket not in self._filling:
            while self._sent and self._held() + bucket.size > self._limit:
                self._take_in_oldest()
            self._filling[bucket] = _zeros(bucket, bucket.size)
            self.peak = max(self.peak, self._held())
        return self._filling[bucket]

    def _held(self) -> int:
        return sum(b.size for b in self._filling) + sum(b.size for b, _, _ in self._sent)

    def _take_in_oldest(self) -> None:
        bucket, _, work = self._sent.popleft()
        self._sums[bucket].add_(work.wait())


def _zeros(bucket: Bucket, size: int) -> Tensor:
    buffer = bucket.buffer
    return torch.zeros(size, dtype=buffer.gradient_dtype, device=buffer.values.device)
