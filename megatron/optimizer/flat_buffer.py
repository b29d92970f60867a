"""Parameters and gradients that live side by side in long one-dimensional tensors.

The parameters of a rank are sorted by their :class:`Traits`: whatever is done to all parameters of
a step (zeroing, norm, update, conversion) is then one operation on each of a few long tensors
instead of one on each of hundreds of short ones, and a collective sends a slice as it lies.

Each parameter becomes a view of its buffer's ``values`` and gets ``main_grad``, a view of the
buffer's ``gradients``. Within a buffer the parameters lie in the reverse order of their creation,
which is about the order in which backward completes their gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.mpu.shard_spec import ShardSpec
from megatron.optimizer.layout import Layout, lay_out


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
        tied: whether they are copies of another stage's.
        partial: whether their gradients still have to be summed over the tensor ranks.
    """

    dtype: torch.dtype
    decayed: bool
    split: bool
    tied: bool
    partial: bool

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Traits:
        """The traits of ``parameter``."""
        spec = shard_spec(parameter)
        return cls(
            dtype=parameter.dtype,
            decayed=parameter.dim() > 1,
            split=spec.dim is not None,
            tied=spec.tied_to is not None,
            partial=spec.partial,
        )


class FlatBuffer:
    """One flat tensor of parameters and one of their gradients.

    Attributes:
        values: [n] in the parameters' dtype; padding is zero.
        gradients: [n] in float32, or float64 for float64 parameters; padding is zero.
        layout: where the parameters lie, in the order of ``parameters``.
        counted: whether this tensor rank counts them in norms and parameter counts.
    """

    def __init__(
        self,
        parameters: tuple[nn.Parameter, ...],
        traits: Traits,
        tensor_rank: int,
        bucket_size: int,
    ) -> None:
        self.parameters = parameters
        self.traits = traits
        self.counted = all(shard_spec(p).counted(tensor_rank) for p in parameters)
        self.layout: Layout = lay_out([p.numel() for p in parameters], bucket_size)
        device = parameters[0].device
        gradient_dtype = torch.promote_types(traits.dtype, torch.float32)
        self.values = torch.zeros(self.layout.size, dtype=traits.dtype, device=device)
        self.gradients = torch.zeros(self.layout.size, dtype=gradient_dtype, device=device)
        self._adopt_parameters()

    @property
    def accumulates_in_place(self) -> bool:
        """Whether autograd itself can add into ``gradients``, being of the same dtype."""
        return self.gradients.dtype == self.values.dtype

    def views(self, flat: Tensor) -> Iterator[Tensor]:
        """Each parameter's part of a tensor laid out like this buffer, in the parameter's shape."""
        for start, parameter in zip(self.layout.starts, self.parameters, strict=True):
            yield flat[start : start + parameter.numel()].view(parameter.shape)

    @torch.no_grad()
    def _adopt_parameters(self) -> None:
        places = zip(
            self.parameters, self.views(self.values), self.views(self.gradients), strict=True
        )
        for parameter, value, gradient in places:
            value.copy_(parameter)
            parameter.data = value
            parameter.main_grad = gradient  # type: ignore[attr-defined]
            parameter.grad = gradient if self.accumulates_in_place else None


def build_flat_buffers(
    parameters: Iterable[nn.Parameter], tensor_rank: int, bucket_size: int
) -> list[FlatBuffer]:
    """Move ``parameters``, given in backward order, into one buffer for each set of traits."""
    sorted_by_traits: dict[Traits, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        sorted_by_traits[Traits.of(parameter)].append(parameter)
    return [
        FlatBuffer(tuple(members), traits, tensor_rank, bucket_size)
        for traits, members in sorted_by_traits.items()
    ]


def shard_spec(parameter: nn.Parameter) -> ShardSpec:
    """The spec that the parameter's layer has attached to it."""
    spec: ShardSpec = parameter.shard_spec  # type: ignore[attr-defined]
    return spec
