"""New parameters on their way to the ranks that have not computed them.

With the distributed optimizer a rank updates its shard of every bucket and receives the rest. The
all-gathers of all buckets start right after the update, in the order in which forward needs them,
and each is waited for where its first parameter is about to be used.

That is known from the modules: whoever uses a parameter calls the module that owns it, before or at
that time. Some owners are never called, such as a last stage's copy of the word embedding, of which
a head takes the weight alone. An owner that has not been called in any forward pass so far, and
that every one is at first, is therefore waited for where the forward pass of its chunk begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from megatron.mpu.collectives import start_all_gather
from megatron.mpu.direct import Pending
from megatron.mpu.parallel_state import Axis
from megatron.optimizer.buckets import Bucket
from megatron.optimizer.weak import weakly


class ParameterGather:
    """The all-gathers over ``axis`` of the parameters of this rank's chunks, bucket by bucket.

    ``buckets`` are in the order in which backward completes them.
    """

    def __init__(self, chunks: Sequence[nn.Module], buckets: Sequence[Bucket], axis: Axis) -> None:
        self._axis = axis
        self._forward_order = list(reversed(buckets))
        self._under_way: dict[Bucket, Pending] = {}
        self._called: set[nn.Module] = set()
        if axis.size > 1:
            for chunk in chunks:
                self._watch_forward(chunk)

    def start(self) -> None:
        """Begin to gather the parameters that all ranks have updated their shards of."""
        if self._axis.size == 1:
            return
        for bucket in self._forward_order:
            values = bucket.values
            own = bucket.own(values, self._axis)
            self._under_way[bucket] = start_all_gather(own, self._axis, values)

    def finish(self) -> None:
        """Wait for all that is under way."""
        self._wait_for(list(self._under_way))

    def _watch_forward(self, chunk: nn.Module) -> None:
        bucket_of = {p: bucket for bucket in self._forward_order for p in bucket.places}
        owned: dict[nn.Module, list[Bucket]] = {}
        for module in chunk.modules():
            buckets = {
                bucket_of[p]: None for p in module.parameters(recurse=False) if p in bucket_of
            }
            if buckets:
                owned[module] = list(buckets)
                before = weakly(self._before_owner)
                module.register_forward_pre_hook(partial(before, owned[module]))
        chunk.register_forward_pre_hook(partial(weakly(self._before_chunk), owned))

    def _before_chunk(self, owned: dict[nn.Module, list[Bucket]], *_: object) -> None:
        if self._under_way:
            for module, buckets in owned.items():
                if module not in self._called:
                    self._wait_for(buckets)

    def _before_owner(self, buckets: list[Bucket], module: nn.Module, _: object) -> None:
        self._called.add(module)
        if self._under_way:
            self._wait_for(buckets)

    def _wait_for(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            work = self._under_way.pop(bucket, None)
            if work is not None:
                work.wait()
