"""Norms: kernel against twin, twin against formulas, forward and backward."""

from __future__ import annotations

import sys
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch.library import opcheck

from megatron.ops import kernels
from megatron.ops.norm import layer_norm, rms_norm, takes
from tests.ops.kernel_cases import (
    DEVICE,
    FORMATS,
    TOLERANCES,
    assert_equals_twin,
    relative_error,
    run,
    with_kernels,
)

EPSILON = 1e-3


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def _inputs(
    rows: int, columns: int, stream: torch.dtype, weights: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight, bias = _draw(rows, columns), _draw(columns, seed=1), _draw(columns, seed=2)
    return x.detach().to(stream), weight.detach().to(weights), bias.detach().to(weights)


def _layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, weight, bias, EPSILON)


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, weight, EPSILON)


def _rms_formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight


@pytest.mark.parametrize("shape", [(3, 2, 7), (5, 7)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = _draw(*shape), _draw(7, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, EPSILON), _rms_formula(x, weight))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPSILON), (x, weight))


def test_layer_norm() -> None:
    x, weight, bias = _draw(3, 2, 7), _draw(7, seed=1), _draw(7, seed=2)
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    expected = centred / (variance + EPSILON).sqrt() * weight + bias
    torch.testing.assert_close(layer_norm(x, weight, bias, EPSILON), expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_wide_stream_gives_the_weights_format(half: torch.dtype) -> None:
    x = _draw(4, 8).detach().float().requires_grad_()
    weight, bias = torch.ones(8, dtype=half), torch.zeros(8, dtype=half)
    weight.requires_grad_()
    for y in (rms_norm(x, weight, EPSILON), layer_norm(x, weight, bias, EPSILON)):
        assert y.dtype == half
        y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == half


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("columns", [7, 8, 64, 768, 1000, 1024, 1600, 4096])
@pytest.mark.parametrize("dtype", FORMATS)
def test_kernel_equals_twin(dtype: torch.dtype, columns: int, rows: int) -> None:
    x, weight, bias = _inputs(rows, columns, dtype, dtype)
    assert_equals_twin(_layer, x, weight, bias)
    assert_equals_twin(_rms, x, weight)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [16411, 17000])
def test_rows_that_no_block_holds(columns: int, weights: torch.dtype) -> None:
    x, weight, bias = _inputs(2, columns, weights, weights)
    assert_equals_twin(_layer, x, weight, bias)


@pytest.mark.parametrize(
    ("stream", "weights"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("columns", [36, 37, 1600])
def test_stream_and_weights_of_two_formats(
    stream: torch.dtype, weights: torch.dtype, columns: int
) -> None:
    x, weight, bias = _inputs(20, columns, stream, weights)
    tolerance = max(TOLERANCES[stream], TOLERANCES[weights])
    assert_equals_twin(_layer, x, weight, bias, tolerance=tolerance)
    assert_equals_twin(_rms, x, weight, tolerance=tolerance)
    with with_kernels():
        y, grad_x, grad_weight, grad_bias = run(_layer, *(t.to(DEVICE) for t in (x, weight, bias)))
    assert (y.dtype, grad_x.dtype) == (weights, stream)
    assert grad_weight.dtype == grad_bias.dtype == weights


def test_two_half_formats_at_once_are_pytorchs() -> None:
    x, weight, _ = _inputs(3, 8, torch.float16, torch.bfloat16)
    with with_kernels():
        assert not takes(x.to(DEVICE), weight.to(DEVICE))
        assert takes(x.to(DEVICE).float(), weight.to(DEVICE))


def test_a_large_mean_costs_the_variance_nothing() -> None:
    """Squares of a thousand less the square of the mean would have no correct digit left here."""
    x, weight, bias = _inputs(4, 1024, torch.float32, torch.float32)
    x = 1000.0 + 0.01 * x
    with with_kernels():
        got = run(_layer, *(t.to(DEVICE) for t in (x, weight, bias)))[0]
    wanted = run(_layer, *(t.double() for t in (x, weight, bias)))[0]
    # What is left is the rounding of the mean: 6e-5 of a thousand, to a deviation of 0.01.
    assert relative_error(got - bias.to(DEVICE), (wanted - bias).to(DEVICE)) < 2e-2
    with with_kernels():
        _, _, rstd = torch.ops.megatron.layer_norm(*(t.to(DEVICE) for t in (x, weight, bias)), 0.0)
    deviation = x.double().var(dim=-1, correction=0).sqrt()
    assert relative_error(rstd.cpu() * deviation, torch.ones(4)) < 1e-4


def test_one_column_is_its_own_mean() -> None:
    x, weight, bias = _inputs(5, 1, torch.float32, torch.float32)
    with with_kernels():
        y, grad_x, grad_weight, _ = run(_layer, *(t.to(DEVICE) for t in (x, weight, bias)))
    assert torch.equal(y.cpu(), bias.expand(5, 1))
    assert not grad_x.any() and not grad_weight.any()
    assert_equals_twin(lambda x, weight: rms_norm(x, weight, 1.0), x, weight)


def test_large_values_of_half_precision() -> None:
    x, weight, bias = _inputs(3, 64, torch.float16, torch.float16)
    x = (x * 1e5).clamp(-65504, 65504)
    assert_equals_twin(_layer, x, weight, bias)
    assert_equals_twin(_rms, x, weight)


VIEWS = {
    "shifted": lambda flat: flat[1:].view(8, 40),
    "transposed": lambda flat: flat[1:].view(40, 8).t(),
    "expanded": lambda flat: flat[1:].view(8, 1, 40).expand(8, 3, 40),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_place_in_memory_will_do(dtype: torch.dtype, view: str) -> None:
    flat, weight, bias = (t.flatten() for t in _inputs(1, 321, dtype, dtype))

    def norm(flat: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return layer_norm(VIEWS[view](flat), weight[1:41], bias[:40], EPSILON)

    assert_equals_twin(norm, flat, weight, bias)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_an_empty_batch_has_empty_results(shape: tuple[int, ...]) -> None:
    _, weight, bias = (t.to(DEVICE) for t in _inputs(1, 8, torch.float32, torch.float32))
    with with_kernels():
        y, grad_x, grad_weight, grad_bias = run(_layer, weight.new_empty(shape), weight, bias)
    assert y.shape == grad_x.shape == shape
    assert grad_weight.shape == (8,) and not grad_weight.any() and not grad_bias.any()


@pytest.mark.parametrize("columns", [200, 1200, 17000])
def test_the_same_bits_in_any_order(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 20 if columns < 9000 else 2
    inputs = [t.to(DEVICE) for t in _inputs(rows, columns, torch.float32, torch.float32)]
    found = []
    for seed in ("1", "2"):
        monkeypatch.setenv("MEGATRON_EMULATOR_SEED", seed)
        with with_kernels():
            found.append(run(_layer, *inputs))
    assert all(map(torch.equal, *found))


def test_twins_equal_the_formulas() -> None:
    x, weight, bias = (t.detach() for t in (_draw(3, 2, 7), _draw(7, seed=1), _draw(7, seed=2)))
    y, mean, rstd = torch.ops.megatron.layer_norm(x, weight, bias, EPSILON)
    torch.testing.assert_close(y, _layer(x, weight, bias))
    torch.testing.assert_close(mean, x.mean(dim=-1))
    torch.testing.assert_close(rstd, (x.var(dim=-1, correction=0) + EPSILON).rsqrt())
    y, _ = torch.ops.megatron.rms_norm(x, weight, EPSILON)
    torch.testing.assert_close(y, _rms_formula(x, weight))


def test_twins_have_the_gradients_of_their_values() -> None:
    x, weight, bias = _draw(3, 2, 7), _draw(7, seed=1), _draw(7, seed=2)
    layer, rms = torch.ops.megatron.layer_norm, torch.ops.megatron.rms_norm
    assert torch.autograd.gradcheck(lambda *t: layer(*t, EPSILON)[0], (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: rms(*t, EPSILON)[0], (x, weight))


@pytest.mark.parametrize("choice", ["torch", "emulated"])
def test_are_operators(choice: str) -> None:
    inputs = [t.requires_grad_() for t in _inputs(6, 8, torch.float32, torch.float32)]
    with kernels.using(choice):
        opcheck(torch.ops.megatron.layer_norm.default, (*inputs, EPSILON))
        opcheck(torch.ops.megatron.rms_norm.default, (*inputs[:2], EPSILON))


def test_apex_is_asked_where_it_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for apex, and for a tensor on a GPU."""
    functional = ModuleType("apex.normalization.fused_layer_norm")
    functional.mixed_dtype_fused_layer_norm_affine = mock.Mock(return_value="layer")
    functional.mixed_dtype_fused_rms_norm_affine = mock.Mock(return_value="rms")
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    monkeypatch.setattr(kernels, "choice", lambda: "apex")
    x, weight, bias = mock.Mock(device=torch.device("cuda"), is_cuda=True), *map(torch.ones, (8, 8))
    x.size.return_value = 8
    with mock.patch.object(kernels, "active", return_value=False):
        assert layer_norm(x, weight, bias, EPSILON) == "layer"
        assert rms_norm(x, weight, EPSILON) == "rms"
    functional.mixed_dtype_fused_layer_norm_affine.assert_called_once_with(
        x, weight, bias, (8,), EPSILON
    )
    functional.mixed_dtype_fused_rms_norm_affine.assert_called_once_with(x, weight, (8,), EPSILON)
