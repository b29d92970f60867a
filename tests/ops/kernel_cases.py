"""Holds a kernel against its twin in float64.

On a machine without a GPU the kernel's source runs in the emulator, thread by thread; with one the
same cases run on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron.ops import kernels

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

FORMATS = (torch.float32, torch.float16, torch.bfloat16)

# Relative, of whole tensors. Half precision is that of the results; inside it is float32.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@contextmanager
def with_kernels() -> Iterator[None]:
    """Kernels run within, and memory that nobody has written holds NaNs."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with kernels.using("cuda" if ON_GPU else "emulated", DEVICE):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(
    function: Callable[..., Any], *inputs: Any, grads: tuple[Tensor, ...] | None = None
) -> list[Tensor]:
    """The results of `function`, and the gradients of its floating-point inputs.

    `grads` are the gradients of the results, one for each; of a single result by default its
    deterministic stand-in of alternating sign.
    """
    inputs = tuple(x.detach().clone().requires_grad_() if _is_real(x) else x for x in inputs)
    results = function(*inputs)
    results = (results,) if isinstance(results, Tensor) else tuple(results)
    differentiated = [i for i, result in enumerate(results) if result.requires_grad]
    if grads is None:
        grads = tuple(_stand_in(results[i]) for i in differentiated)
    torch.autograd.backward(
        [results[i] for i in differentiated],
        [grad.to(results[i]) for i, grad in zip(differentiated, grads, strict=True)],
    )
    found = [x.grad for x in inputs if _is_real(x) and x.grad is not None]
    return [*(result.detach() for result in results), *found]


def assert_equals_twin(
    function: Callable[..., Any], *inputs: Any, tolerance: float | None = None
) -> None:
    """The kernel's results and gradients against those of the twin, computed in float64.

    The inputs are drawn in the format that the kernel is to take; the twin gets the same values.
    """
    dtype = next(x.dtype for x in inputs if _is_real(x))
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    inputs = tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in inputs)
    with with_kernels():
        got = run(function, *inputs)
    with kernels.using("torch", DEVICE):
        wanted = run(function, *(x.double() if _is_real(x) else x for x in inputs))
    assert len(got) == len(wanted)
    for place, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert one.shape == other.shape
        error = relative_error(one, other)
        assert error <= tolerance, f"result {place} of {dtype} is off by {error:.1e}"


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| of whole tensors; NaN counts as infinite."""
    difference = (got.double() - wanted.double()).norm()
    error = (difference / wanted.double().norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def _is_real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _stand_in(result: Tensor) -> Tensor:
    """Some gradient, the same for every format: its values need no rounding in any of them."""
    places = torch.arange(result.numel(), dtype=torch.float64, device=result.device)
    return torch.cos(places * 1.7).mul(64).round().div(64).view(result.shape)
