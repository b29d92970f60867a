"""How large the outputs of a model's layers are, however these are spread over ranks.

The mean square of all elements of a layer's output over ranks and micro-batches does not depend on
whether each rank has a part of it or the whole, nor on how the samples are grouped. In the order of
the forward pass, the first that differs is where a wrong result comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from megatron.optimizer.flat_buffer import shard_spec

Moments = dict[str, tuple[float, int]]
"""Sum of squares and number of elements by the name of the layer's weight."""


@contextmanager
def watched_outputs(chunks: Iterable[nn.Module]) -> Iterator[Moments]:
    """Within it, the outputs of all layers that have a weight are summed up."""
    moments: Moments = {}
    handles = []
    for module in (module for chunk in chunks for module in chunk.modules()):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            add = partial(_add, moments, shard_spec(weight).key)
            handles.append(module.register_forward_hook(add))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _add(moments: Moments, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    total, count = moments.get(name, (0.0, 0))
    squares = output.detach().double().square().sum().item()
    moments[name] = total + squares, count + output.numel()


def mean_squares(ranks: Iterable[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """The mean square of each layer's output over all ranks, in the order of the forward pass."""
    parts: dict[str, list[tuple[float, int]]] = {}
    for moments in ranks:
        for name, moment in moments.items():
            parts.setdefault(name, []).append(moment)
    return {
        name: math.fsum(total for total, _ in moments) / sum(count for _, count in moments)
        for name, moments in parts.items()
    }
