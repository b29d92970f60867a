"""Products by either library are right, in every layout of their operands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from megatron.ops import matmul
from megatron.ops.matmul import add_product, adds_wide, linear_product, prefers_onednn, product

ONEDNN = pytest.param(
    True,
    marks=pytest.mark.skipif(
        not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN"
    ),
)


@pytest.fixture(params=[False, ONEDNN])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: request.param)


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error <= 1e-6


@pytest.mark.parametrize("shape", [(5, 3, 12), (7, 12), (1, 12), (33, 2, 1, 12)])
def test_linear(library: None, shape: tuple[int, ...]) -> None:
    x, weight, bias = _draw(*shape), _draw(20, 12, seed=1), _draw(20, seed=2)
    for b in (bias, None):
        expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
        found = linear_product(x, weight, b)
        assert found.shape == expected.shape and found.is_contiguous()
        _close(found, expected)
    turned = x.transpose(0, -2)
    _close(linear_product(turned, weight, None), F.linear(turned.double(), weight.double()))


@pytest.mark.parametrize("sizes", [(4, 6, 8), (1, 300, 5), (64, 1, 64)])
def test_products_of_turned_matrices(library: None, sizes: tuple[int, int, int]) -> None:
    m, k, n = sizes
    a, b = _draw(k, m).t(), _draw(n, k, seed=1).t()
    expected = a.double() @ b.double()
    _close(product(a, b), expected)
    for dtype in (torch.float32, torch.float64):
        total = _draw(m, n, seed=2).to(dtype)
        wanted = total.double() + expected
        add_product(total, a, b)
        _close(total, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_formats_are_left_to_torch(library: None, dtype: torch.dtype) -> None:
    a, b = _draw(4, 6).to(dtype), _draw(6, 8, seed=1).to(dtype)
    assert torch.equal(product(a, b), a @ b)
    assert linear_product(a, b.t(), None).dtype == dtype


def test_nothing_has_a_product(library: None) -> None:
    assert linear_product(torch.empty(0, 3, 4), _draw(5, 4), None).shape == (0, 3, 5)


def test_the_choice_is_the_same_each_time() -> None:
    prefers_onednn.cache_clear()
    first = prefers_onednn()
    prefers_onednn.cache_clear()
    assert prefers_onednn() == first


def _wide(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    total.add_(a.to(total.dtype) @ b.to(total.dtype))


def _rounded(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    total.copy_((total + a.to(total.dtype) @ b.to(total.dtype)).bfloat16())


def _replaced(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    total.copy_(a.to(total.dtype) @ b.to(total.dtype))


def _missing(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    raise NotImplementedError("Could not run")


@pytest.mark.parametrize(
    ("operator", "is_right"),
    [(_wide, True), (_rounded, False), (_replaced, False), (_missing, False)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_that_adds_to_a_wider_format_is_tried_out(
    operator: Callable[..., None],
    is_right: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul, "_add_wide", operator)
    tried = adds_wide.__wrapped__(torch.device("cpu"), dtype, torch.float32)
    assert tried is is_right
