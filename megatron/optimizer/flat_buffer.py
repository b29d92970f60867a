"""Parameters and gradients that live side by side in long one-dimensional tensors.

The parameters of a rank are sorted by their :class:`Traits`: whatever is done to all parameters of
a step (zeroing, norm, update, conversion) is then one operation on each of a few long tensors
instead of one on each of hundreds of short ones, and a collective sends a slice as it lies.

Each parameter becomes a view of its buffer's ``values``. Where whole gradients are kept it gets
``main_grad``, a view of the buffer's ``gradients``. Within a buffer the parameters lie in the
reverse order of their creation, which is about the order in which backward completes their
gradients.

What this rank updates is a :class:`Shard`: a whole buffer, or with the distributed optimizer its
part of a bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.mpu.shard_spec import ShardSpec
from megatron.optimizer.layout import BUCKET_MULTIPLE, Layout, lay_out


@dataclass(frozen=True)
class Traits:
    """What the parameters of one buffer have in common.

    They are the same on all tensor ranks, and so is the layout of the buffers. What several of
    them hold whole is then summed over the data ranks in the same order everywhere, since the
    order of the sum may depend on an element's place, and stays bitwise the same.

    Attributes:
        dtype: number format of the parameters.
        decayed: whether weight decay applies; not to biases and norms, which have one dimension.
        split: whether they are split over the tensor ranks, not held whole by each.
        partial: whether their gradients still have to be summed over the tensor ranks.
        shared: the name of a tensor that is held in several places. It has a buffer to itself, so
            that all its holders cut it into the same shards.
    """

    dtype: torch.dtype
    decayed: bool
    split: bool
    partial: bool
    shared: str | None

    @classmethod
    def of(cls, parameter: nn.Parameter, shared: Collection[str]) -> Traits:
        """The traits of ``parameter``; ``shared`` are the names of tensors that have copies."""
        spec = shard_spec(parameter)
        return cls(
            dtype=parameter.dtype,
            decayed=parameter.dim() > 1,
            split=spec.dim is not None,
            partial=spec.partial,
            shared=spec.key if spec.key in shared else None,
        )


class FlatBuffer:
    """One flat tensor of parameters and, where they are kept whole, one of their gradients.

    Attributes:
        values: [n] in the parameters' dtype; padding is zero.
        gradients: [n] in ``gradient_dtype``, padding is zero; or None.
        layout: where the parameters lie, in the order of ``parameters``.
        counted: whether this tensor rank counts them in norms and parameter counts.

    The parameters of a ``shared`` buffer are one tensor in several places of this rank's model, and
    lie in one place.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        traits: Traits,
        tensor_rank: int,
        bucket_size: int,
        *,
        shards: int = 1,
        whole_gradients: bool = True,
    ) -> None:
        self.traits = traits
        self.counted = any(shard_spec(p).counted(tensor_rank) for p in parameters)
        self.parameters = tuple(parameters)
        if traits.shared is not None:  # the owner's values count, where it is among them
            self.parameters = tuple(sorted(parameters, key=lambda p: shard_spec(p).tied_to or ""))
        self.layout: Layout = lay_out(
            [p.numel() for p in self.parameters],
            bucket_size,
            bucket_multiple=BUCKET_MULTIPLE * shards,
            one_place=traits.shared is not None,
        )
        device = parameters[0].device
        self.values = torch.zeros(self.layout.size, dtype=traits.dtype, device=device)
        self.gradients = None
        if whole_gradients:
            self.gradients = torch.zeros_like(self.values, dtype=self.gradient_dtype)
        self._adopt_parameters()

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Float32, or float64 for float64 parameters."""
        return torch.promote_types(self.traits.dtype, torch.float32)

    @property
    def accumulates_in_place(self) -> bool:
        """Whether autograd itself can add into ``gradients``, being of the same dtype."""
        return self.gradients is not None and self.gradients.dtype == self.values.dtype

    def views(self, flat: Tensor) -> Iterator[Tensor]:
        """Each parameter's part of a tensor laid out like this buffer, in the parameter's shape."""
        for start, parameter in zip(self.layout.starts, self.parameters, strict=True):
            yield flat[start : start + parameter.numel()].view(parameter.shape)

    @torch.no_grad()
    def _adopt_parameters(self) -> None:
        values = zip(self.parameters, self.views(self.values), strict=True)
        for index, (parameter, value) in enumerate(values):
            if index == 0 or self.traits.shared is None:
                value.copy_(parameter)
            parameter.data = value
            parameter.grad = None
        if self.gradients is None:
            return
        for parameter, gradient in zip(self.parameters, self.views(self.gradients), strict=True):
            parameter.main_grad = gradient  # type: ignore[attr-defined]
            parameter.grad = gradient if self.accumulates_in_place else None


@dataclass(frozen=True)
class Shard:
    """The elements of a buffer, from ``start`` on, that this rank updates.

    ``gradients`` [n] are theirs once a step's sums are finished; ``first:last`` are the parameters
    that may lie among them.
    """

    buffer: FlatBuffer
    start: int
    gradients: Tensor
    first: int
    last: int

    @property
    def values(self) -> Tensor:
        """The parameters' elements [n]."""
        return self.buffer.values[self.start : self.start + self.gradients.numel()]

    def parts(self, flat: Tensor) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
        """What of each parameter lies in a tensor laid out like this shard, be it nothing.

        Yields (parameter, [m], index of the first of the m in the flattened parameter). A tensor
        that lies in one place for several parameters comes once.
        """
        last = self.first + 1 if self.buffer.traits.shared is not None else self.last
        for index in range(self.first, last):
            parameter, place = self.buffer.parameters[index], self.buffer.layout.starts[index]
            begin = min(max(self.start - place, 0), parameter.numel())
            end = min(max(self.start + flat.numel() - place, begin), parameter.numel())
            offset = place + begin - self.start
            yield parameter, flat[offset : offset + end - begin] if end > begin else flat[:0], begin


def build_flat_buffers(
    parameters: Sequence[nn.Parameter],
    tensor_rank: int,
    bucket_size: int,
    *,
    shared: Collection[str] = (),
    shards: int = 1,
    whole_gradients: bool = True,
) -> list[FlatBuffer]:
    """Move ``parameters``, given in backward order, into one buffer for each set of traits.

    ``shared`` are the names of tensors that other ranks hold, too; ``shards`` is the number of
    equal parts into which every bucket is to be cut.
    """
    copies = (shard_spec(parameter).tied_to for parameter in parameters)
    shared = {*shared, *(key for key in copies if key is not None)}
    sorted_by_traits: dict[Traits, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        sorted_by_traits[Traits.of(parameter, shared)].append(parameter)
    return [
        FlatBuffer(
            members,
            traits,
            tensor_rank,
            bucket_size,
            shards=shards,
            whole_gradients=whole_gradients,
        )
        for traits, members in sorted_by_traits.items()
    ]


def shard_spec(parameter: nn.Parameter) -> ShardSpec:
    """The spec that the parameter's layer has attached to it."""
    spec: ShardSpec = parameter.shard_spec  # type: ignore[attr-defined]
    return spec
