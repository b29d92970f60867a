"""Operations on many tensors at once: kernels and twins against float64."""

from math import inf, nan

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from megatron.ops import kernels
from megatron.ops.multi_tensor import add_at_, divide_, sum_of_squares
from tests.ops.kernel_cases import DEVICE, FORMATS, ON_GPU, with_kernels

SIZES = (4096, 1, 3, 0, 5000, 1024 * 9)


def draw(dtype: torch.dtype, *sizes: int, offset: int = 0) -> list[Tensor]:
    """Tensors that begin `offset` elements behind an aligned address, of many magnitudes."""
    generator = torch.Generator().manual_seed(sum(sizes))
    drawn = []
    for size in sizes:
        x = torch.randn(size + offset, generator=generator)
        x *= torch.rand(x.shape, generator=generator).pow(4)
        drawn.append(x.to(DEVICE, dtype)[offset:])
    return drawn


def exact_sum(tensors: list[Tensor]) -> Tensor:
    return sum((x.double().square().sum() for x in tensors), torch.zeros((), device=DEVICE))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", FORMATS)
def test_sum_of_squares_is_exact_to_the_rounding_of_single_squares(
    dtype: torch.dtype, offset: int
) -> None:
    for tensors in (
        draw(dtype, *SIZES, offset=offset),
        draw(dtype, 4096, 8192, offset=offset),
        draw(dtype, *[5] * 150, offset=offset),  # more than one launch takes
        draw(dtype, 0),
        [draw(dtype, 600)[0].view(20, 30).t()],
    ):
        wanted = exact_sum(tensors)
        with with_kernels():
            got = sum_of_squares(tensors)
        assert got.dtype == torch.float64 and got.shape == ()
        assert abs(got - wanted) <= 2e-8 * wanted
        with kernels.using("torch", DEVICE):
            assert abs(sum_of_squares(tensors) - wanted) <= 1e-14 * wanted


def test_sum_of_more_tiles_than_blocks() -> None:
    x = torch.linspace(-1, 3, 4096 * 4100 + 4, device=DEVICE)
    with with_kernels():
        got = sum_of_squares([x])
    assert abs(got / exact_sum([x]) - 1) < 2e-8


def test_squares_near_the_end_of_float32_do_not_overflow_together() -> None:
    x = torch.full((1024 * 100,), 5e18, device=DEVICE)
    with with_kernels():
        assert sum_of_squares([x]).item() == pytest.approx(25e36 * x.numel(), rel=1e-6)


@pytest.mark.parametrize("poison", [inf, -inf, nan])
@pytest.mark.parametrize("place", [0, 4999])
def test_one_bad_element_shows(poison: float, place: int) -> None:
    tensors = draw(torch.float32, 4096, 5000)
    tensors[1][place] = poison
    with with_kernels():
        assert not sum_of_squares(tensors).isfinite()


@pytest.mark.skipif(ON_GPU, reason="the order in which threads run is the emulator's")
def test_sum_does_not_depend_on_the_order_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw(torch.float32, *SIZES)
    sums = set()
    for seed in "0017":
        monkeypatch.setenv("MEGATRON_EMULATOR_SEED", seed)
        with with_kernels():
            sums.add(sum_of_squares(tensors).item())
    assert len(sums) == 1


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", FORMATS)
def test_quotients_are_rounded_once(dtype: torch.dtype, offset: int) -> None:
    divisor = torch.tensor(1.7, device=DEVICE)
    for sizes in (SIZES, (4096, 4096), (5,) * 70, (0,), ()):
        tensors = draw(dtype, *sizes, offset=offset)
        wanted = [(x.float() / divisor).to(dtype) for x in tensors]
        with with_kernels():
            divide_(tensors, divisor)
        assert all(torch.equal(x, y) for x, y in zip(tensors, wanted, strict=True))


@pytest.mark.parametrize(("begin", "gap", "offset"), [(0, 0, 0), (64, 4, 0), (1, 3, 0), (0, 0, 1)])
@pytest.mark.parametrize("dtype", FORMATS)
def test_terms_are_added_bit_by_bit_where_they_belong(
    dtype: torch.dtype, begin: int, gap: int, offset: int
) -> None:
    for sizes in (SIZES, (4096, 8), (12,) * 150, (0,), ()):
        terms = draw(dtype, *sizes, offset=offset)
        starts = [begin + sum(sizes[:i]) + gap * i for i in range(len(sizes))]
        order = range(len(sizes))[::-1]  # the terms need not come in the order of their places
        starts, terms = [starts[i] for i in order], [terms[i] for i in order]
        (flat,) = draw(torch.float32, begin + sum(sizes) + gap * len(sizes) + 5)
        wanted = flat.clone()
        for start, term in zip(starts, terms, strict=True):
            wanted[start : start + len(term)].add_(term)
        with with_kernels():
            add_at_(flat, starts, terms)
        assert torch.equal(flat, wanted)


def test_neighbours_are_left_alone() -> None:
    whole = torch.ones(5000, device=DEVICE)
    with with_kernels():
        divide_([whole[3:4500]], torch.tensor(2.0, device=DEVICE))
    assert (whole[3:4500] == 0.5).all()
    assert (whole[:3] == 1).all() and (whole[4500:] == 1).all()


def test_float64_is_divided_in_float64() -> None:
    x = torch.ones(3, dtype=torch.float64, device=DEVICE)
    with with_kernels():
        divide_([x], torch.tensor(3.0, dtype=torch.float64, device=DEVICE))
    assert (x == 1 / 3).all()


@pytest.mark.parametrize("choice", ["torch", "emulated"])
def test_are_operators(choice: str) -> None:
    tensors = [torch.randn(5), torch.randn(3)]
    with kernels.using(choice):
        opcheck(torch.ops.megatron.sum_of_squares.default, (tensors[0], tensors[1:]))
        opcheck(torch.ops.megatron.divide_.default, (tensors, torch.tensor(2.0)))
        terms = [tensor.bfloat16() for tensor in tensors]
        opcheck(torch.ops.megatron.add_at_.default, (torch.randn(9), [4, 0], terms))
