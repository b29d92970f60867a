"""Dropout keeps the mean, and the backward pass drops what the forward pass dropped."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from megatron.ops import kernels
from megatron.ops.dropout import bias_dropout_add, dropout
from megatron.ops.philox import Draw, kept
from tests.ops.kernel_cases import DEVICE, FORMATS, assert_equals_twin, run, with_kernels

PROBABILITIES = (0.0, 0.1, 0.5)


def _draw(key: int = 0x1234567_89ABCDEF, number: int = 3) -> Draw:
    return Draw(torch.tensor([key], device=DEVICE), number)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_kept_is_scaled_up() -> None:
    torch.manual_seed(0)
    x = torch.ones(100_000, requires_grad=True)
    y = dropout(x, 0.25)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((y == 0).double().mean().item() - 0.25) < 0.01
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


def test_nothing_is_dropped_without_a_probability() -> None:
    x = torch.ones(3)
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_kernel_equals_twin(dtype: torch.dtype, probability: float) -> None:
    for rows, columns in ((1, 8), (1, 1), (70, 33), (67, 264), (2, 520)):
        x, residual = (_normal(2, rows, columns, seed=i).to(dtype) for i in range(2))
        bias = _normal(columns, seed=2).to(dtype)
        for arguments in product((x,), (bias, None), (residual, None)):
            assert_equals_twin(_from_present(arguments, probability), *_present(arguments))


@pytest.mark.parametrize(
    ("dtype", "stream"), [p for p in product(FORMATS, repeat=2) if len({*p}) > 1]
)
def test_the_stream_may_have_another_format(dtype: torch.dtype, stream: torch.dtype) -> None:
    half = torch.half if torch.half in (dtype, stream) else torch.bfloat16
    tolerance = 2e-3 if half == torch.half else 1e-2
    for columns in (24, 7):
        x, bias = _normal(37, columns).to(dtype), _normal(columns, seed=1).to(dtype)
        residual = _normal(37, columns, seed=2).to(stream)
        for probability in PROBABILITIES:
            function = _from_present((x, bias, residual), probability)
            assert_equals_twin(function, x, bias, residual, tolerance=tolerance)
            with with_kernels():
                inputs = (each.to(DEVICE) for each in (x, bias, residual))
                y, grad_x, grad_bias, grad_residual = run(function, *inputs)
            assert [each.dtype for each in (y, grad_residual)] == [stream] * 2
            assert [each.dtype for each in (grad_x, grad_bias)] == [dtype] * 2


def test_rows_need_not_lie_side_by_side_or_at_whole_packs() -> None:
    x, residual = _normal(6, 5, 16), _normal(6, 5, 16, seed=1)
    bias = _normal(16, seed=2)

    def shifted(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        flat = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
        return bias_dropout_add(
            flat, bias.flip(0), residual.transpose(0, 1), probability=0.1, draw=_draw()
        )

    assert_equals_twin(shifted, x.transpose(0, 1), bias, residual)


def test_all_may_be_dropped() -> None:
    x, residual = _normal(9, 12), _normal(9, 12, seed=1)
    assert_equals_twin(_from_present((x, None, residual), 1.0), x, residual)


def test_what_is_dropped_may_be_infinite() -> None:
    x = torch.full((4, 256), torch.inf, device=DEVICE)
    residual = torch.zeros(4, 256, device=DEVICE)
    with with_kernels():
        y = bias_dropout_add(x, None, residual, probability=0.5, draw=_draw())
    assert {0.0, torch.inf} == set(y.unique().tolist())


def test_the_backward_pass_drops_what_the_forward_pass_dropped() -> None:
    x = torch.ones(70, 40, device=DEVICE, requires_grad=True)
    residual = torch.zeros(70, 40, device=DEVICE, requires_grad=True)
    bias = torch.zeros(40, device=DEVICE, requires_grad=True)
    draw = _draw()
    with with_kernels():
        y = bias_dropout_add(x, bias, residual, probability=0.25, draw=draw)
        y.sum().backward()
    mask = kept(draw, x.shape, 0.25)
    torch.testing.assert_close(y.detach(), mask / 0.75)
    assert x.grad is not None and torch.equal(x.grad, y.detach())
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, mask.sum(0) / 0.75)
    assert residual.grad is not None and bool((residual.grad == 1.0).all())


def test_gradients_that_are_the_results_are_not_copied() -> None:
    x, residual = (_normal(3, 8).requires_grad_() for _ in range(2))
    with kernels.using("emulated"):
        y = bias_dropout_add(x, None, residual, probability=0.0, draw=None)
        grad = torch.ones_like(y)
        found = torch.autograd.grad(y, (x, residual), grad)
    assert all(each.data_ptr() == grad.data_ptr() for each in found)


def test_a_key_written_over_before_the_backward_pass_is_an_error() -> None:
    x, draw = _normal(3, 8).requires_grad_(), Draw(torch.tensor([5]), 0)
    y = bias_dropout_add(x, None, None, probability=0.1, draw=draw)
    draw.key.fill_(6)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


def test_equal_draws_give_equal_bits() -> None:
    inputs = [_normal(200, 72, seed=i).to(DEVICE) for i in range(2)]
    bias = _normal(72, seed=2).to(DEVICE)
    function = _from_present((inputs[0], bias, inputs[1]), 0.1)
    with with_kernels():
        first, second = (run(function, inputs[0], bias, inputs[1]) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_twin_has_the_gradient_of_its_values(probability: float) -> None:
    inputs = [_normal(*s).double().requires_grad_() for s in ((5, 6), (6,), (5, 6))]
    draw = Draw(torch.tensor([7]), 2)
    with kernels.using("torch"):
        assert torch.autograd.gradcheck(
            lambda *inputs: bias_dropout_add(*inputs, probability=probability, draw=draw), inputs
        )


@pytest.mark.parametrize("choice", ["torch", "emulated"])
def test_is_an_operator(choice: str) -> None:
    x, residual, bias = (_normal(*s).requires_grad_() for s in ((3, 8), (3, 8), (8,)))
    half = x.detach().bfloat16().requires_grad_()
    key = torch.tensor([7])
    with kernels.using(choice):
        for arguments in (
            (x, bias, residual, key, 3, 0.1),
            (x, None, residual, None, 0, 0.0),
            (half, None, residual, key, 0, 0.1),
            (x, bias, None, key, 2**33, 0.1),
        ):
            opcheck(torch.ops.megatron.bias_dropout_add.default, arguments)


def test_an_empty_batch_has_empty_results() -> None:
    x, residual = (torch.zeros(0, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    bias = torch.zeros(8, device=DEVICE, requires_grad=True)
    with with_kernels():
        bias_dropout_add(x, bias, residual, probability=0.1, draw=_draw()).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 8)
    assert bias.grad is not None and not bias.grad.any()


def _masks(probability: float, count: int = 200_000) -> Tensor:
    """Those of keys and draws of which each differs from the first in one respect, [4, count]."""
    places = ((1, 0), (1, 1), (2, 0), (1 + 2**32, 0))
    masks = [
        kept(Draw(torch.tensor([key]), number), torch.Size([count]), probability)
        for key, number in places
    ]
    return torch.stack(masks).double()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_right_share_is_kept(probability: float) -> None:
    masks = _masks(probability)
    sigma = math.sqrt(probability * (1.0 - probability) / masks.size(1))
    assert bool(((masks.mean(dim=1) - (1.0 - probability)).abs() < 5.0 * sigma).all())


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_draws_and_neighbours_are_independent(probability: float) -> None:
    masks = _masks(probability) - (1.0 - probability)
    count, variance = masks.size(1), probability * (1.0 - probability)
    between = (masks @ masks.t() / count / variance).fill_diagonal_(0.0)
    assert float(between.abs().max()) < 5.0 / math.sqrt(count)
    for lag in (1, 2, 3, 4, 1024):
        within = (masks[:, lag:] * masks[:, :-lag]).mean(dim=1) / variance
        assert float(within.abs().max()) < 5.0 / math.sqrt(count - lag)


def _present(arguments: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [each for each in arguments if each is not None]


def _from_present(
    arguments: tuple[Tensor | None, ...], probability: float
) -> Callable[..., Tensor]:
    """The operator as a function of those of x, bias and residual that are not None."""

    def function(*present: Tensor) -> Tensor:
        rest = iter(present)
        full = [None if each is None else next(rest) for each in arguments]
        assert full[0] is not None
        return bias_dropout_add(full[0], full[1], full[2], probability=probability, draw=_draw())

    return function
