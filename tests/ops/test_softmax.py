"""The fused softmax of scores: kernel against twin, twin against formulas."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from megatron.ops import kernels
from megatron.ops.softmax import scaled_softmax
from tests.ops.kernel_cases import DEVICE, FORMATS, assert_equals_twin, run, with_kernels

SCALE = 0.37


def scores(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 4).to(dtype)


def visible(*shape: int, seed: int = 5) -> torch.Tensor:
    """A mask in which every query sees the first key, unlike a third of the others."""
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.33
    seen[..., 0] = True
    return seen


def softmax(x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    return scaled_softmax(x, seen, scale=SCALE)


def causal(x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    return scaled_softmax(x, seen, scale=SCALE, causal=True)


# Around the ends of what a warp, a block's registers and its shared memory hold.
LENGTHS = (1, 7, 64, 100, 256, 512, 520, 1024, 2047, 2048, 4096, 4104, 16384)


@pytest.mark.parametrize("columns", LENGTHS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_kernel_equals_twin_on_rows_of_any_length(columns: int, dtype: torch.dtype) -> None:
    x = scores(1, 1, 1 if columns > 4096 else 2, columns, dtype=dtype)
    assert_equals_twin(softmax, x)
    assert_equals_twin(softmax, x, visible(1, 1, 1, columns))


@pytest.mark.parametrize("dtype", FORMATS)
def test_rows_that_no_memory_holds_are_read_twice(dtype: torch.dtype) -> None:
    for columns in (16389, 33000):
        x = scores(1, 1, 1, columns, dtype=dtype)
        assert_equals_twin(softmax, x, visible(1, 1, 1, columns))


@pytest.mark.parametrize("shape", [(2, 3, 9, 16), (1, 2, 16, 9), (2, 1, 5, 70), (1, 1, 3, 4500)])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_query_sees_no_key_ahead(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = scores(*shape, dtype=dtype)
    assert_equals_twin(causal, x)
    assert_equals_twin(causal, x, visible(shape[0], 1, 1, shape[3]))
    with with_kernels():
        weights = causal(x.to(DEVICE))
    assert not weights.triu(1).any()


@pytest.mark.parametrize("of_query", [1, 5])
@pytest.mark.parametrize("of_head", [1, 3])
@pytest.mark.parametrize("of_batch", [1, 2])
@pytest.mark.parametrize("columns", [24, 25])
def test_masks_broadcast(of_batch: int, of_head: int, of_query: int, columns: int) -> None:
    seen = visible(of_batch, of_head, of_query, columns)
    assert_equals_twin(softmax, scores(2, 3, 5, columns), seen)
    assert_equals_twin(softmax, scores(2, 3, 5, columns), seen[..., :1])


def test_rows_may_begin_anywhere() -> None:
    for dtype in FORMATS:
        memory = scores(2 * 40 + 1, dtype=dtype)
        assert_equals_twin(lambda x: softmax(x[1:].view(1, 1, 2, 40)), memory)
        assert_equals_twin(lambda x: softmax(x.transpose(2, 3)), scores(1, 2, 40, 6, dtype=dtype))
    whole = visible(2, 1, 1, 41)
    assert_equals_twin(softmax, scores(2, 2, 3, 40), whole[..., 1:])


@pytest.mark.parametrize("columns", [40, 1500, 5000, 20000])
def test_extreme_scores(columns: int) -> None:
    """Large scores of either sign, and scores of minus infinity, which a key may get."""
    x = scores(1, 1, 3, columns)
    x[..., 0] *= 1e4
    x[..., 1, 1:9] = 3e38
    x[..., 2, 3:] = float("-inf")
    got, twin = both(softmax, x)
    torch.testing.assert_close(got, twin, rtol=1e-5, atol=1e-30)
    half = torch.tensor([60000.0, -60000.0, 59968.0, 0.0], dtype=torch.float16).view(1, 1, 1, 4)
    got, twin = both(softmax, half)
    torch.testing.assert_close(got, twin, rtol=2e-3, atol=1e-7)


def both(function, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    """The kernel's and the twin's result."""
    inputs = tuple(x.to(DEVICE) for x in inputs)
    with with_kernels():
        got = function(*inputs)
    with kernels.using("torch", DEVICE):
        return got, function(*inputs)


@pytest.mark.parametrize("columns", [30, 2000, 5000, 20000])
def test_a_query_that_sees_nothing_has_no_weights(columns: int) -> None:
    seen = visible(2, 1, 1, columns)
    seen[1] = False
    for function in (softmax, causal):
        got, twin = both(function, scores(2, 1, 2, columns), seen)
        assert twin[1].isnan().all()
        assert torch.equal(got.isnan(), twin.isnan())


def test_results_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen = scores(1, 2, 3, 1500).to(DEVICE), visible(1, 1, 1, 1500).to(DEVICE)
    with with_kernels():
        first = run(causal, x, seen)
        monkeypatch.setenv("MEGATRON_EMULATOR_SEED", "77")
        second = run(causal, x, seen)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_twin_equals_formula() -> None:
    x, seen = scores(2, 3, 4, 6).double(), visible(2, 1, 1, 6)
    plain = torch.softmax(x * SCALE, dim=-1)
    torch.testing.assert_close(softmax(x), plain, rtol=1e-14, atol=1e-14)
    masked = torch.exp(x * SCALE) * seen
    masked = masked / masked.sum(-1, keepdim=True)
    torch.testing.assert_close(softmax(x, seen), masked, rtol=1e-14, atol=1e-14)
    lower = (torch.exp(x * SCALE) * seen).tril()
    lower = lower / lower.sum(-1, keepdim=True)
    torch.testing.assert_close(causal(x, seen), lower, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("function", [softmax, causal])
def test_twin_has_the_gradient_of_its_values(function) -> None:  # type: ignore[no-untyped-def]
    x = scores(2, 2, 3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradcheck(function, (x, visible(2, 1, 3, 5)))


@pytest.mark.parametrize("choice", ["torch", "emulated"])
def test_is_an_operator(choice: str) -> None:
    x, seen = scores(2, 2, 3, 8).requires_grad_(), visible(2, 1, 1, 8)
    with kernels.using(choice):
        opcheck(torch.ops.megatron.scaled_softmax.default, (x, None, SCALE, True))
        opcheck(torch.ops.megatron.scaled_softmax.default, (x, seen, SCALE, False))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_scores_have_empty_weights(shape: tuple[int, ...]) -> None:
    with with_kernels():
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        softmax(x).sum().backward()
    assert x.grad is not None and x.grad.shape == shape
