"""Normalisations against their formulas, forward and backward, in float64."""

from __future__ import annotations

import pytest
import torch

from megatron.ops.norm import layer_norm, rms_norm

EPSILON = 1e-3


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


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
