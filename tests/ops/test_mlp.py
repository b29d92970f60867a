"""The fused activation: kernel against twin, twin against formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from megatron.ops import kernels
from megatron.ops.mlp import KINDS, bias_activation
from tests.ops.kernel_cases import FORMATS, assert_equals_twin, with_kernels

FORMULAS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_kernel_equals_twin(kind: str, gated: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(kind) + gated)
    for rows, columns in ((3, 8), (70, 33), (130, 1), (130, 200)):
        width = columns * (1 + gated)
        x = torch.randn(2, rows, width, generator=generator).to(dtype) * 3
        for bias in (torch.randn(width, generator=generator).to(dtype), None):
            assert_equals_twin(
                lambda x, bias=None: bias_activation(x, bias, kind, gated=gated),
                *([x] if bias is None else [x, bias]),
            )


@pytest.mark.parametrize("kind", KINDS)
def test_twin_equals_formula(kind: str) -> None:
    x, bias = torch.randn(5, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    plain = bias_activation(x, bias, kind, gated=False)
    torch.testing.assert_close(plain, FORMULAS[kind](x + bias), rtol=1e-14, atol=1e-14)
    gate, linear = (x + bias).chunk(2, dim=-1)
    gated = bias_activation(x, bias, kind, gated=True)
    torch.testing.assert_close(gated, FORMULAS[kind](gate) * linear, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_twin_has_the_gradient_of_its_values(kind: str, gated: bool) -> None:
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (6,))]
    assert torch.autograd.gradcheck(
        lambda x, bias: bias_activation(x, bias, kind, gated=gated), inputs
    )


@pytest.mark.parametrize("choice", ["torch", "emulated"])
def test_is_an_operator(choice: str) -> None:
    inputs = [torch.randn(*s, requires_grad=True) for s in ((2, 3, 8), (8,))]
    with kernels.using(choice):
        opcheck(torch.ops.megatron.bias_activation.default, (*inputs, "gelu", True))
        opcheck(torch.ops.megatron.bias_activation.default, (inputs[0], None, "silu", False))


@pytest.mark.parametrize("gated", [False, True])
def test_inputs_may_lie_anywhere(gated: bool) -> None:
    """Transposed, unaligned, and with gaps between their elements."""
    width = 32 * (1 + gated)
    memory = torch.randn(2 * 5 * width + 1)
    for laid_out in (
        lambda memory: (memory[1:].view(-1, width), memory[1 : 1 + width]),
        lambda memory: (memory[:-1].view(width, -1).t(), memory[: 2 * width : 2]),
    ):
        assert_equals_twin(
            lambda memory: bias_activation(*laid_out(memory), "gelu", gated=gated),  # noqa: B023
            memory,
        )


def test_an_empty_batch_has_empty_results() -> None:
    with with_kernels():
        x = torch.randn(0, 8, requires_grad=True)
        bias = torch.randn(8, requires_grad=True)
        bias_activation(x, bias, "gelu", gated=False).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 8)
    assert bias.grad is not None and not bias.grad.any()
