"""A backward pass in two: the gradients of inputs now, those of weights later.

The previous pipeline stage waits for the gradient of an activation, and nobody but the optimizer
for the gradients of weights. Zero-bubble schedules (arXiv 2401.10241) therefore compute the latter
where a rank would otherwise be idle::

    with defer_weight_gradients() as deferred:
        torch.autograd.backward(output, gradient)      # B: input gradients
    ...
    deferred.compute()                                 # W: weight gradients

Only the split linear layers know how to defer. Until its last product is done, a parameter's
``outstanding`` says how many are missing; then its ``completed`` is called, where one is set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class DeferredGradients:
    """Products of weight gradients that a backward pass has left for later, in its order."""

    def __init__(self) -> None:
        self._products: list[tuple[nn.Parameter, Callable[[], None]]] = []

    def add(self, weight: nn.Parameter, product: Callable[[], None]) -> None:
        """Leave ``product``, which adds a term to the gradient of ``weight``."""
        weight.outstanding = outstanding(weight) + 1  # type: ignore[attr-defined]
        self._products.append((weight, product))

    @torch.no_grad()
    def compute(self) -> None:
        """Do all products in their order, letting go of what each has held."""
        self._products.reverse()
        while self._products:
            weight, product = self._products.pop()
            product()
            weight.outstanding = left = outstanding(weight) - 1  # type: ignore[attr-defined]
            completed = getattr(weight, "completed", None)
            if left == 0 and completed is not None:
                completed()


def outstanding(parameter: nn.Parameter) -> int:
    """How many terms of the parameter's gradient have been left for later."""
    count: int = getattr(parameter, "outstanding", 0)
    return count


# Of the process, not of a thread: autograd runs the backward pass of a GPU on threads of its own.
_current: list[DeferredGradients] = []


def current_deferral() -> DeferredGradients | None:
    """Where a layer leaves its weight gradient; None where it computes it at once."""
    return _current[-1] if _current else None


@contextmanager
def defer_weight_gradients() -> Iterator[DeferredGradients]:
    """Within it, backward passes leave the weight gradients of the split linear layers."""
    _current.append(DeferredGradients())
    try:
        yield _current[-1]
    finally:
        _current.pop()
