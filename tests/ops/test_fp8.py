"""Factors in 8 bits: the formats bit by bit, kernel against twin, products against float64."""

import os
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from megatron.errors import ConfigError
from megatron.ops import kernels
from megatron.ops.fp8 import (
    E4M3,
    E5M2,
    Factor,
    fp8_cast,
    fp8_scale,
    fp8_transpose,
    require_fp8,
    scaled_product,
)
from tests.ops.kernel_cases import DEVICE, FORMATS, ON_GPU, relative_error, with_kernels

SHAPES = ((1, 16), (16, 16), (63, 48), (64, 128), (130, 144), (65, 272))
has_products = pytest.mark.skipif(
    ON_GPU and torch.cuda.get_device_capability() < (8, 9), reason="the GPU has no 8-bit products"
)
# A GPU sums with fewer bits than float32 has.
SUMMED = 2e-3 if ON_GPU else 1e-6
ONE = torch.ones((), device=DEVICE)


def _drawn(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    wide = torch.randn(rows, columns, generator=generator)
    return (wide * torch.exp(2.0 * torch.randn(rows, columns, generator=generator))).to(
        DEVICE, dtype
    )


def _factor(x: Tensor, format: torch.dtype) -> Factor:
    scale = fp8_scale(x, format)
    return Factor(fp8_cast(x, scale, format)[0], scale)


def _bits(x: Tensor) -> Tensor:
    return (x if x.dim() else x[None]).view(torch.uint8)


def _assert_same_numbers(got: Tensor, wanted: Tensor) -> None:
    """Bit by bit, but for the kinds of NaN."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    both_nan = got.float().isnan() & wanted.float().isnan()
    assert torch.all(both_nan | (_bits(got) == _bits(wanted)))


def _narrowed(x: Tensor, format: torch.dtype) -> Tensor:
    """PyTorch's own conversion of what is finite, cut off; NaN of the rest."""
    limit = torch.finfo(format).max
    return x.float().clamp(-limit, limit).masked_fill(~x.isfinite(), torch.nan).to(format)


def _all_of_bfloat16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def _any_float32() -> Tensor:
    """Numbers of every exponent, and those half way between two of e4m3 and of e5m2."""
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (2**15,), generator=generator, dtype=torch.int64)
    near = torch.randint(0x34000000, 0x48000000, (2**15,), generator=generator)
    ties = near & ~0x7FFFF
    off_ties = ties + torch.randint(-1, 2, ties.shape, generator=generator)
    return torch.cat((bits, near, ties, off_ties)).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_the_kernel_rounds_as_pytorch_does(format: torch.dtype) -> None:
    for x in (_all_of_bfloat16(), _any_float32()):
        x = x.view(-1, 64).to(DEVICE)
        with with_kernels():
            values, turned = fp8_cast(x, ONE, format, transposed=True)
        _assert_same_numbers(values, _narrowed(x, format))
        _assert_same_numbers(turned.t(), _narrowed(x, format))


@pytest.mark.parametrize("format", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", FORMATS)
def test_kernel_equals_twin(dtype: torch.dtype, format: torch.dtype) -> None:
    for rows, columns in SHAPES:
        x = _drawn(rows, columns, dtype)
        found = []
        for choice in (with_kernels, lambda: kernels.using("torch", DEVICE)):
            kept = torch.full((), 3.0, device=DEVICE)
            with choice():
                scale = fp8_scale(x, format)
                values, turned = fp8_cast(x, scale, format, transposed=True, kept=kept)
                alone, _ = fp8_cast(x, scale, format)
                nothing, turned_alone = fp8_cast(
                    x, scale, format, as_it_lies=False, transposed=True
                )
                again = fp8_transpose(Factor(values, scale)).values
            assert nothing.numel() == 0
            assert torch.equal(_bits(alone), _bits(values))
            for other in (turned_alone, again):
                assert torch.equal(_bits(other), _bits(turned))
            found.append((scale, kept, values, turned))
        for got, wanted in zip(*found, strict=True):
            assert got.shape == wanted.shape
            assert torch.equal(_bits(got), _bits(wanted))


def test_no_barrier_is_missing() -> None:
    x = _drawn(130, 144, torch.bfloat16)
    found = []
    for seed in ("0", "1", "2"):
        with mock.patch.dict(os.environ, MEGATRON_EMULATOR_SEED=seed), with_kernels():
            kept = torch.zeros((), device=DEVICE)
            scale = fp8_scale(x, E4M3)
            values, turned = fp8_cast(x, scale, E4M3, transposed=True, kept=kept)
            turned_again = fp8_transpose(Factor(values, scale)).values
        found.append([_bits(t) for t in (scale, kept, values, turned, turned_again)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("choice", ["kernel", "twin"])
def test_scale_and_values_say_what_they_stand_for(choice: str) -> None:
    x = _drawn(70, 32, torch.float32)
    with with_kernels() if choice == "kernel" else kernels.using("torch", DEVICE):
        for format, places in ((E4M3, 3), (E5M2, 2)):
            scale = fp8_scale(x, format)
            values, turned = fp8_cast(x, scale, format, transposed=True)
            assert values.float().abs().max() == torch.finfo(format).max
            restored = values.double() * scale.double()
            normal = x.abs() > scale * torch.finfo(format).smallest_normal
            off = (restored / x.double() - 1.0).abs()[normal]
            assert normal.any() and off.max() <= 2.0 ** -(places + 1) * (1 + 1e-5)
            assert turned.shape == (32, 80)
            assert torch.equal(_bits(turned[:, :70]), _bits(values).t())
            assert not _bits(turned[:, 70:]).any()


@pytest.mark.parametrize("choice", ["kernel", "twin"])
def test_recent_magnitudes_stand_for_the_tensor_s_own(choice: str) -> None:
    x = _drawn(16, 32, torch.float32)
    with with_kernels() if choice == "kernel" else kernels.using("torch", DEVICE):
        known = fp8_scale(x, E4M3, torch.full((), 896.0, device=DEVICE))
        unknown = fp8_scale(x, E4M3, torch.zeros((), device=DEVICE))
        assert known == 2.0
        torch.testing.assert_close(unknown, x.abs().max() / 448)
        values, _ = fp8_cast(x, known / 2048, E4M3)
        assert torch.isfinite(values.float()).all() and (values.float().abs() == 448).any()


@has_products
@pytest.mark.parametrize("choice", ["kernel", "twin"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(choice: str, bad: float) -> None:
    x = _drawn(16, 32, torch.float32)
    x[3, 5] = bad
    kept = torch.ones((), device=DEVICE)
    with with_kernels() if choice == "kernel" else kernels.using("torch", DEVICE):
        for format in (E4M3, E5M2):
            values, _ = fp8_cast(x, ONE, format, kept=kept)
            assert values.float().isnan().sum() == 1 and values.float().isnan()[3, 5]
            assert not kept.isfinite()
            ones = _factor(torch.ones_like(x), E4M3)
            assert scaled_product(_factor(x, format), ones, torch.float32)[3].isnan().all()


@has_products
@pytest.mark.parametrize("choice", ["kernel", "twin"])
def test_zeros_and_nothing(choice: str) -> None:
    with with_kernels() if choice == "kernel" else kernels.using("torch", DEVICE):
        zeros = torch.zeros(16, 32, device=DEVICE)
        scale = fp8_scale(zeros, E5M2)
        assert scale > 0 and not fp8_cast(zeros, scale, E5M2)[0].float().any()
        nothing = torch.zeros(0, 32, device=DEVICE)
        values, turned = fp8_cast(nothing, fp8_scale(nothing, E4M3), E4M3, transposed=True)
        assert values.shape == (0, 32) and turned.shape == (32, 0)
        factor, weight = Factor(values, ONE), Factor(fp8_cast(zeros, ONE, E4M3)[0], ONE)
        assert scaled_product(factor, weight, torch.float32).shape == (0, 16)
        turned_factor = Factor(turned, ONE)
        assert not scaled_product(turned_factor, turned_factor, torch.float32).any()


def test_views_may_start_and_lie_anywhere() -> None:
    base = _drawn(40, 48, torch.bfloat16)
    for x in (base.flatten()[1 : 1 + 32 * 48].view(32, 48), base[:32, :32].t(), base[::2, :16]):
        with with_kernels():
            got = (fp8_scale(x, E4M3), *fp8_cast(x, ONE, E4M3, transposed=True))
        torch.testing.assert_close(got[0], x.abs().max().float() / 448)
        _assert_same_numbers(got[1], _narrowed(x, E4M3))
        _assert_same_numbers(got[2].t()[: x.size(0)], _narrowed(x, E4M3))


@has_products
@pytest.mark.parametrize(("format", "expected"), [(E4M3, 0.05), (E5M2, 0.09)])
def test_product_is_that_of_the_factors(format: torch.dtype, expected: float) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(n, 64, generator=generator).to(DEVICE) for n in (20, 48))
    one, other = _factor(a, format), _factor(b, E4M3)
    got = scaled_product(one, other, torch.float32)
    exact = [f.values.double() * f.scale.double() for f in (one, other)]
    assert relative_error(got, exact[0] @ exact[1].t()) < SUMMED
    error = relative_error(got, a.double() @ b.double().t())
    assert expected / 4 < error < expected
    bias = torch.randn(48, generator=generator).to(DEVICE, torch.bfloat16)
    for dtype, most in ((torch.float32, SUMMED), (torch.bfloat16, 1e-2)):
        with_bias = scaled_product(one, other, dtype, bias=bias.to(dtype))
        assert with_bias.dtype == dtype
        assert relative_error(with_bias, exact[0] @ exact[1].t() + bias.double()) < most


@pytest.mark.parametrize("choice", ["torch", "emulated"])
def test_are_operators(choice: str) -> None:
    x, kept = torch.randn(20, 32), torch.zeros(())
    with kernels.using(choice):
        ops = torch.ops.megatron
        opcheck(ops.fp8_scale.default, (x, E4M3, None))
        opcheck(ops.fp8_scale.default, (x, E5M2, kept))
        opcheck(ops.fp8_cast.default, (x, torch.ones(()), E4M3, True, True, kept))
        opcheck(ops.fp8_cast.default, (x, torch.ones(()), E5M2, False, True, None))
        opcheck(ops.fp8_transpose.default, (torch.ones(()), x.to(E4M3).view(torch.uint8)))


def test_older_gpus_are_refused() -> None:
    require_fp8(torch.device("cpu"))
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)),
        mock.patch("torch.cuda.get_device_name", return_value="NVIDIA A100"),
        mock.patch("torch.version.cuda", "13.0"),
        pytest.raises(ConfigError, match=r"--fp8-format .* 8\.9 .* NVIDIA A100 with 8\.0"),
    ):
        require_fp8(torch.device("cuda"))
