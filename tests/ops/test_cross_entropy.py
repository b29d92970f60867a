"""Cross entropy's kernels against their twins, and the twins against PyTorch's cross entropy."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from megatron.ops import kernels
from megatron.ops.cross_entropy import logits_gradient, row_losses
from tests.ops.kernel_cases import DEVICE, FORMATS, TOLERANCES, relative_error, with_kernels

# rows, columns, the first token, columns that count. A block takes 512 elements or 512 packs of 4
# or 8 at a time, four of them before it looks at the first.
SHAPES = (
    (3, 1, 0, 1),
    (2, 7, 30, 7),
    (4, 40, 40, 33),
    (2, 24, 24, 0),
    (2, 8 * 512 + 100, 0, 8 * 512 + 97),
    (1, 5 * 8 * 512 + 11, 1000, 5 * 8 * 512 + 3),
)


def _case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, scale: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets here and elsewhere, and gradients of which one is zero."""
    rows, columns, start, real = shape
    generator = torch.Generator().manual_seed(rows + columns)
    logits = (torch.randn(rows, columns, generator=generator) * scale).to(dtype)
    targets = torch.randint(start, start + max(real, 1), (rows,), generator=generator)
    targets[-1:] = start + real + 5 if rows > 2 else start + max(real - 1, 0)
    grads = torch.randn(rows, generator=generator)
    grads[1:2] = 0.0
    return logits.to(DEVICE), targets.to(DEVICE), grads.to(DEVICE)


def _both(
    logits: Tensor, targets: Tensor, grads: Tensor, start: int, real: int, overwrite: bool
) -> list[Tensor]:
    loss, statistics = row_losses(logits, targets, start, real)
    # Of a rank that has none of the vocabulary, another one's numbers.
    maxima, totals = statistics[0].clamp(min=-10.0), statistics[1].clamp(min=0.5)
    grads = grads.to(loss.dtype)
    gradient = logits_gradient(
        logits, targets, maxima, totals, grads, start, real, overwrite=overwrite
    )
    return [loss, *statistics, gradient]


def _assert_equals_twin(
    logits: Tensor, targets: Tensor, grads: Tensor, start: int, real: int, overwrite: bool = False
) -> list[Tensor]:
    dtype, wide = logits.dtype, logits.double()
    with with_kernels():
        got = _both(logits, targets, grads, start, real, overwrite)
    wanted = _both(wide, targets, grads, start, real, False)
    for place, (one, other) in enumerate(zip(got, wanted, strict=True)):
        # All but the gradient comes in float32, whatever the logits are in.
        tolerance = TOLERANCES[dtype] if place == 4 else 1e-6
        error = relative_error(one, other) if real or place not in (0, 2) else 0.0
        assert one.shape == other.shape and error <= tolerance, f"result {place}: {error:.1e}"
        assert one.dtype == (dtype if place == 4 else torch.float32)
    assert not got[-1][:, real:].any()
    return got


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FORMATS)
def test_kernel_equals_twin(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    _assert_equals_twin(*_case(shape, dtype), *shape[2:])


def _unaligned(logits: Tensor) -> Tensor:
    return torch.empty(logits.numel() + 1, dtype=logits.dtype, device=DEVICE)[1:].view_as(logits)


def _in_wider_rows(logits: Tensor) -> Tensor:
    rows, columns = logits.shape
    return torch.empty(rows, columns + 5, dtype=logits.dtype, device=DEVICE)[:, 2:-3]


def _in_rows_of_another_length(logits: Tensor) -> Tensor:
    rows, columns = logits.shape
    return torch.empty(rows, columns + 1, dtype=logits.dtype, device=DEVICE)[:, :columns]


def _transposed(logits: Tensor) -> Tensor:
    return torch.empty_like(logits.t()).contiguous().t()


_LAYOUTS = (_unaligned, _in_wider_rows, _in_rows_of_another_length, _transposed)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("laid_out", _LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_rows_may_lie_anywhere(
    dtype: torch.dtype, laid_out: Callable[[Tensor], Tensor], overwrite: bool
) -> None:
    shape = (3, 605, 0, 603)
    logits, targets, grads = _case(shape, dtype)
    lying = laid_out(logits).copy_(logits)
    got = _assert_equals_twin(lying, targets, grads, 0, 603, overwrite)
    assert torch.equal(lying, got[-1] if overwrite else logits)
    assert (got[-1] is lying) == overwrite


@pytest.mark.parametrize("dtype", FORMATS)
def test_overwriting_changes_nothing_but_the_place(dtype: torch.dtype) -> None:
    shape = (3, 4300, 10, 4290)
    logits, targets, grads = _case(shape, dtype)
    with with_kernels():
        apart = _both(logits, targets, grads, *shape[2:], False)
        before = logits._version
        again = _both(logits, targets, grads, *shape[2:], True)
    assert all(torch.equal(one, other) for one, other in zip(apart, again, strict=True))
    assert again[-1] is logits and logits._version > before


@pytest.mark.parametrize("grads", [torch.tensor(0.5).expand(4), torch.arange(8.0)[::2]])
def test_gradients_of_losses_may_be_expanded_or_strided(grads: Tensor) -> None:
    logits, targets, _ = _case((4, 30, 0, 30), torch.float32)
    _assert_equals_twin(logits, targets, grads.to(DEVICE), 0, 30)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e4), (torch.float16, 2e4), (torch.bfloat16, 1e4)]
)
def test_large_logits(dtype: torch.dtype, scale: float) -> None:
    logits, targets, grads = _case((4, 700, 0, 700), dtype, 0.0)
    generator = torch.Generator().manual_seed(1)
    # Some rows near their maximum everywhere, so that many columns count; some spread out.
    logits += (torch.randn(4, 700, generator=generator).to(DEVICE) + scale).to(dtype)
    logits[2:] *= torch.randn(2, 700, generator=generator).to(DEVICE, dtype)
    if dtype == torch.float16:
        logits[0, 5], logits[1, 6] = 65504.0, -65504.0
        logits = logits.clamp(-65504.0, 65504.0)
    _assert_equals_twin(logits, targets, grads, 0, 700)


@pytest.mark.parametrize("dtype", FORMATS)
def test_tokens_that_are_ruled_out(dtype: torch.dtype) -> None:
    """Their logits are minus infinity; nothing comes of them."""
    logits, _, grads = _case((3, 100, 0, 100), dtype)
    logits[:, :60] = float("-inf")
    targets = torch.tensor([60, 80, 99], device=DEVICE)
    got = _assert_equals_twin(logits, targets, grads, 0, 100)
    assert not got[-1][:, :60].any()


def test_a_row_without_gradient_is_not_read() -> None:
    logits, targets, grads = _case((3, 40, 0, 40), torch.float32)
    with with_kernels():
        _, statistics = row_losses(logits, targets, 0, 40)
        logits[1], statistics[:, 1] = float("nan"), -1e4
        got = logits_gradient(
            logits, targets, statistics[0], statistics[1], grads, 0, 40, overwrite=True
        )
    assert got.isfinite().all() and not got[1].any() and got[0].any()


def test_nan_stays_visible() -> None:
    logits, targets, _ = _case((3, 40, 0, 40), torch.float32)
    logits[0, 7], logits[2, 0] = float("nan"), float("inf")
    with with_kernels():
        loss, _ = row_losses(logits, targets, 0, 40)
    assert loss.isnan().tolist() == [True, False, True]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the emulator draws the order of threads")
def test_the_order_of_threads_changes_nothing() -> None:
    shape = (2, 4500, 0, 4444)
    results = []
    for seed in ("0", "12345", "0"):
        case = _case(shape, torch.bfloat16)
        with mock.patch.dict(os.environ, {"MEGATRON_EMULATOR_SEED": seed}), with_kernels():
            results.append(_both(*case, *shape[2:], True))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_no_rows_have_no_losses() -> None:
    logits, targets, grads = (x[:0] for x in _case((3, 8, 0, 8), torch.float32))
    with with_kernels():
        loss, *_, gradient = _both(logits, targets, grads, 0, 8, True)
    assert loss.shape == (0,) and gradient.shape == (0, 8)


def test_twin_equals_pytorchs() -> None:
    logits, targets, grads = _case((5, 17, 0, 17), torch.float64)
    targets[-1] = 3
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole, targets, reduction="none")
    expected.backward(grads.double())
    loss, *_, gradient = _both(logits, targets, grads, 0, 17, False)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("choice", ["torch", "emulated"])
def test_are_operators(choice: str) -> None:
    operators: Any = torch.ops.megatron
    logits, targets, grads = (x.cpu() for x in _case((3, 20, 4, 18), torch.bfloat16))
    with kernels.using(choice):
        opcheck(operators.cross_entropy_forward.default, (logits, targets, 4, 18))
        _, (maxima, totals, _) = row_losses(logits, targets, 4, 18)
        arguments = (logits, targets, maxima.clone(), totals.clone(), grads, 4, 18)
        opcheck(operators.cross_entropy_backward.default, arguments)
        opcheck(operators.cross_entropy_backward_.default, arguments)
