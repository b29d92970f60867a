"""An addition to the stream and the norm of the sum in one pass: kernel, twin and formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from megatron.ops import kernels
from megatron.ops.fused_norm import norm_after_add
from megatron.ops.norm import layer_norm, rms_norm
from megatron.ops.philox import Draw, kept
from tests.ops.kernel_cases import DEVICE, TOLERANCES, assert_equals_twin, run, with_kernels

EPSILON = 1e-3
KEY = 0x1234_5678_9ABC
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16


def _draw(key: int = KEY, number: int = 7) -> Draw:
    return Draw(torch.tensor([key], device=DEVICE), number)


def _inputs(
    shape: tuple[int, ...], stream: torch.dtype, weights: torch.dtype, seed: int = 0
) -> list[Tensor]:
    """x, residual, weight, bias, norm_bias."""
    generator = torch.Generator().manual_seed(seed)
    h = shape[-1:]
    return [
        torch.randn(each, generator=generator, dtype=torch.float64).to(dtype)
        for each, dtype in [(shape, weights), (shape, stream), *[(h, weights)] * 3]
    ]


def _function(
    probability: float, *, bias: bool = True, centred: bool = True, draw: Draw | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`norm_after_add` of x, residual, weight, and of bias and norm_bias where it has them."""
    draw = _draw() if draw is None and probability else draw

    def function(x: Tensor, residual: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        added = rest[0] if bias else None
        norm_bias = rest[-1] if centred else None
        return norm_after_add(
            *(x, added, residual, weight, norm_bias, EPSILON), probability=probability, draw=draw
        )

    return function


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize(
    ("stream", "weights"),
    [(SINGLE, SINGLE), (HALF, HALF), (BRAIN, BRAIN), (SINGLE, BRAIN), (SINGLE, HALF)],
)
@pytest.mark.parametrize("columns", [7, 8, 768, 1000, 1600])
def test_kernel_equals_twin(
    columns: int, stream: torch.dtype, weights: torch.dtype, probability: float
) -> None:
    x, residual, weight, bias, norm_bias = _inputs((2, 3, columns), stream, weights)
    tolerance = max(TOLERANCES[stream], TOLERANCES[weights])
    both = x, residual, weight, bias, norm_bias
    assert_equals_twin(_function(probability), *both, tolerance=tolerance)
    lone = _function(probability, bias=False, centred=False)
    assert_equals_twin(lone, x, residual, weight, tolerance=tolerance)


@pytest.mark.parametrize("columns", [1, 64, 4096, 9000])
def test_short_and_long_rows(columns: int) -> None:
    """At 9000 columns a row is longer than what a block holds in the backward pass."""
    x, residual, weight, bias, norm_bias = _inputs((3, columns), SINGLE, SINGLE)
    tolerance = 1e-5 if columns == 1 else None  # whose gradient is a difference of equal numbers
    biased = _function(0.1, centred=False)
    assert_equals_twin(biased, x, residual, weight, bias, tolerance=tolerance)
    if columns > 1:
        centred = _function(0.1, bias=False)
        assert_equals_twin(centred, x, residual, weight, norm_bias)


def test_rows_that_no_block_holds() -> None:
    x, residual, weight, bias, norm_bias = _inputs((2, 17000), BRAIN, BRAIN)
    assert_equals_twin(_function(0.1), x, residual, weight, bias, norm_bias)


def test_many_rows_add_up_in_the_gradients_of_the_parameters() -> None:
    assert_equals_twin(_function(0.1), *_inputs((200, 40), SINGLE, SINGLE))


def test_any_place_in_memory_will_do() -> None:
    function = _function(0.5)

    def shifted(x: Tensor, residual: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return function(x[1:].view(40, 8).t(), residual[1:].view(8, 40), *rest)

    x, residual, *_ = _inputs((321,), SINGLE, SINGLE)
    assert_equals_twin(shifted, x, residual, *_inputs((8, 40), SINGLE, SINGLE)[2:])


@pytest.mark.parametrize("centred", [True, False])
def test_twin_equals_formula(centred: bool) -> None:
    x, residual, weight, bias, norm_bias = _inputs((5, 12), torch.float64, torch.float64)
    draw = Draw(torch.tensor([KEY]), 3)
    arguments = x, bias, residual, weight, norm_bias if centred else None, EPSILON
    total, y = norm_after_add(*arguments, probability=0.25, draw=draw)
    wanted = residual + kept(draw, x.shape, 0.25) * (x + bias) / 0.75
    torch.testing.assert_close(total, wanted)
    normed = layer_norm(wanted, weight, norm_bias, EPSILON)
    torch.testing.assert_close(y, normed if centred else rms_norm(wanted, weight, EPSILON))


@pytest.mark.parametrize("probability", [0.0, 0.25])
@pytest.mark.parametrize("centred", [True, False])
def test_twin_has_the_gradient_of_its_values(probability: float, centred: bool) -> None:
    inputs = _inputs((3, 6), torch.float64, torch.float64)[: 5 if centred else 4]
    draw = Draw(torch.tensor([KEY]), 3)
    function = _function(probability, centred=centred, draw=draw)
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("result", [0, 1])
def test_one_result_may_go_unused(result: int) -> None:
    inputs = _inputs((4, 16), SINGLE, SINGLE)
    function = _function(0.3)
    assert_equals_twin(lambda *t: function(*t)[result], *inputs)


def test_the_norm_sees_the_sum_as_it_is_stored() -> None:
    x, residual, weight, bias, norm_bias = (t.to(DEVICE) for t in _inputs((4, 64), BRAIN, BRAIN))
    with with_kernels():
        arguments = x, bias, residual, weight, norm_bias, EPSILON
        total, y = norm_after_add(*arguments, probability=0.3, draw=_draw())
        assert torch.equal(y, layer_norm(total, weight, norm_bias, EPSILON))


def test_key_and_number_say_what_is_dropped() -> None:
    x, residual, weight, bias, norm_bias = (t.to(DEVICE) for t in _inputs((8, 64), SINGLE, SINGLE))

    def dropped(draw: Draw) -> Tensor:
        arguments = x, bias, residual, weight, norm_bias, EPSILON
        with with_kernels():
            return norm_after_add(*arguments, probability=0.3, draw=draw)[0] == residual

    assert torch.equal(dropped(_draw()), dropped(_draw()))
    assert torch.equal(dropped(_draw()), ~kept(_draw(), x.shape, 0.3))
    assert not torch.equal(dropped(_draw()), dropped(_draw(number=8)))
    assert not torch.equal(dropped(_draw()), dropped(_draw(key=KEY + 1)))


def test_without_dropout_one_gradient_serves_both() -> None:
    x, residual, weight, *_ = (t.to(DEVICE) for t in _inputs((4, 16), BRAIN, BRAIN))
    seen = []
    for each in (x, residual):
        each.requires_grad_().register_hook(lambda grad: seen.append(grad.data_ptr()))
    with with_kernels():
        arguments = x, None, residual, weight, None, EPSILON
        _, y = norm_after_add(*arguments, probability=0.0, draw=None)
        y.sum().backward()
    assert seen[0] == seen[1]


@pytest.mark.parametrize("choice", ["torch", "emulated"])
def test_is_an_operator(choice: str) -> None:
    inputs = [t.requires_grad_() for t in _inputs((6, 8), SINGLE, SINGLE)]
    x, residual, weight, bias, norm_bias = inputs
    key = torch.tensor([KEY])
    operator = torch.ops.megatron.norm_after_add.default
    with kernels.using(choice):
        opcheck(operator, (x, bias, residual, weight, norm_bias, EPSILON, 0.3, key, 1))
        opcheck(operator, (x, None, residual, weight, None, EPSILON, 0.0, None, 0))


def test_an_empty_batch_has_empty_results() -> None:
    inputs = [t.to(DEVICE) for t in _inputs((0, 8), SINGLE, SINGLE)]
    with with_kernels():
        total, y, grad_x, grad_residual, *sums = run(_function(0.3), *inputs)
    assert total.shape == y.shape == grad_x.shape == grad_residual.shape == (0, 8)
    assert len(sums) == 3 and not any(each.any() for each in sums)


@pytest.mark.parametrize("columns", [40, 1200])
def test_the_same_bits_in_any_order(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [t.to(DEVICE) for t in _inputs((20, columns), BRAIN, BRAIN)]
    found = []
    for seed in ("1", "2"):
        monkeypatch.setenv("MEGATRON_EMULATOR_SEED", seed)
        with with_kernels():
            found.append(run(_function(0.3), *inputs))
    assert all(map(torch.equal, *found))
