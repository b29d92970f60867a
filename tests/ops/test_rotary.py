"""Rotary positions turn by the formula, and scores depend on distance alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from megatron.model import GPTModel
from megatron.mpu import ParallelState
from megatron.mpu.stage import stages
from megatron.ops import kernels
from megatron.ops.rotary import Rotation, rotate, rotate_packed, rotation
from tests.configs import small
from tests.ops.kernel_cases import (
    DEVICE,
    FORMATS,
    assert_equals_twin,
    relative_error,
    with_kernels,
)

# s, b, g, shared, d, r: packs of 16 bytes and smaller ones, odd counts of pairs, single rows.
SHAPES = (
    (5, 2, 3, 1, 16, 16),
    (3, 2, 2, 4, 32, 16),
    (4, 3, 1, 2, 24, 8),
    (7, 1, 2, 1, 10, 6),
    (2, 2, 1, 3, 7, 2),
    (1, 1, 1, 1, 2, 2),
    (70, 2, 2, 1, 64, 64),
)


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def test_each_pair_is_turned_by_its_angle() -> None:
    x, positions = _draw(5, 2, 3, 8), torch.tensor([0, 1, 4, 9, 2]).unsqueeze(1)
    turned = rotate(x, rotation(positions, 6, 100.0, torch.float64))
    for s, position in enumerate(positions.flatten().tolist()):
        for pair in range(3):
            angle = position / 100.0 ** (2 * pair / 6)
            first, second = x[s, ..., pair], x[s, ..., 3 + pair]
            expected = first * math.cos(angle) - second * math.sin(angle)
            torch.testing.assert_close(turned[s, ..., pair], expected)
            expected = second * math.cos(angle) + first * math.sin(angle)
            torch.testing.assert_close(turned[s, ..., 3 + pair], expected)
    assert torch.equal(turned[..., 6:], x[..., 6:])


def test_scores_depend_on_the_distance() -> None:
    query, key = _draw(1, 1, 1, 8), _draw(1, 1, 1, 8, seed=1)

    def score(at: int, other: int) -> torch.Tensor:
        turn = [rotation(torch.tensor([[p]]), 8, 1e4, torch.float64) for p in (at, other)]
        return (rotate(query, turn[0]) * rotate(key, turn[1])).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100))
    assert not torch.allclose(score(7, 3), score(7, 4))


def _turn(s: int, b: int, r: int) -> Rotation:
    """Of a position, or where b is not 1 of each sample's own positions; as float64."""
    positions = torch.arange(s * b).view(b, s).t() * 3 % 17
    return Rotation(*(each.to(DEVICE) for each in rotation(positions, r, 50.0, torch.float64)))


def _packed(by: Rotation, shared: int, mixed: torch.Tensor) -> torch.Tensor:
    return rotate_packed(mixed, Rotation(*(each.to(mixed.dtype) for each in by)), shared)


@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_turns_as_heads_are_turned(shape: tuple[int, ...], own_positions: bool) -> None:
    s, b, g, shared, d, r = shape
    mixed = _draw(s, b, g, shared + 2, d).to(DEVICE).requires_grad_()
    by = _turn(s, b if own_positions else 1, r)
    query, key, value = mixed.split((shared, 1, 1), dim=3)
    query, key = rotate(query.flatten(2, 3), by), rotate(key.squeeze(3), by)
    expected = torch.cat((query.view(s, b, g, shared, d), key.unsqueeze(3), value), dim=3)
    got = rotate_packed(mixed, by, shared)
    assert torch.equal(got, expected)
    grad = _draw(*mixed.shape, seed=1).to(DEVICE)
    (wanted,) = torch.autograd.grad(expected, mixed, grad)
    (found,) = torch.autograd.grad(got, mixed, grad)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_kernel_equals_twin(
    dtype: torch.dtype, shape: tuple[int, ...], own_positions: bool
) -> None:
    s, b, g, shared, d, r = shape
    by = Rotation(*(each.to(dtype) for each in _turn(s, b if own_positions else 1, r)))
    mixed = _draw(s, b, g, shared + 2, d).to(dtype)
    assert_equals_twin(lambda mixed: _packed(by, shared, mixed), mixed)


def test_heads_need_not_lie_side_by_side_or_at_whole_packs() -> None:
    by = _turn(5, 1, 8)
    mixed = _draw(5, 2, 3, 3, 16).float()

    def shifted(mixed: torch.Tensor) -> torch.Tensor:
        return _packed(
            by, 1, torch.cat((mixed.new_zeros(1), mixed.flatten()))[1:].view(5, 2, 3, 3, 16)
        )

    assert_equals_twin(shifted, mixed)
    assert_equals_twin(lambda mixed: _packed(by, 1, mixed.transpose(1, 2)), mixed)
    cos, sin = (torch.cat((each.new_zeros(1), each.flatten()))[1:].view_as(each) for each in by)
    assert_equals_twin(lambda mixed: _packed(Rotation(cos, sin), 1, mixed), mixed)


def test_values_and_other_channels_keep_their_bits() -> None:
    mixed = _draw(3, 2, 2, 3, 16).bfloat16().to(DEVICE)
    mixed[:, :, :, -1] = torch.inf
    mixed[..., 8:] = torch.inf
    with with_kernels():
        turned = _packed(_turn(3, 1, 8), 1, mixed)
    assert torch.equal(turned[..., -1, :], mixed[..., -1, :])
    assert torch.equal(turned[..., 8:], mixed[..., 8:])
    assert bool(turned[..., :-1, :8].isfinite().all())


def test_the_gradient_is_turned_back() -> None:
    mixed = _draw(4, 2, 2, 3, 8).requires_grad_()
    by = _turn(4, 2, 6)
    assert torch.autograd.gradcheck(lambda mixed: rotate_packed(mixed, by, 1), mixed)
    assert torch.autograd.gradgradcheck(lambda mixed: rotate_packed(mixed, by, 1), mixed)


@pytest.mark.parametrize("choice", ["torch", "emulated"])
def test_is_an_operator(choice: str) -> None:
    mixed = _draw(4, 2, 2, 3, 8).float().requires_grad_()
    cos, sin = (each.float().cpu() for each in _turn(4, 2, 6))
    with kernels.using(choice):
        for back in (False, True):
            opcheck(torch.ops.megatron.rotate_packed.default, (mixed, cos, sin, 1, back))


def test_nothing_is_turned_to_nothing() -> None:
    mixed = torch.zeros(4, 0, 2, 3, 8, device=DEVICE, requires_grad=True)
    with with_kernels():
        turned = _packed(_turn(4, 1, 8), 1, mixed)
        turned.sum().backward()
    assert turned.shape == mixed.shape
    assert mixed.grad is not None and mixed.grad.shape == mixed.shape


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_a_model_with_kernels_equals_one_without(percent: float, groups: int) -> None:
    config = small(
        vocab_size=53,
        make_vocab_size_divisible_by=8,
        num_layers=2,
        max_position_embeddings=12,
        seq_length=12,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        position_embedding_type="rope",
        rotary_percent=percent,
        num_query_groups=groups,
    )
    (stage,) = stages([config.model.num_layers])
    model = GPTModel(config, ParallelState.single(), stage)
    ids = torch.randint(53, (2, 13), generator=torch.Generator().manual_seed(4))

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(ids[:, :-1], labels=ids[:, 1:]).mean()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [loss.detach(), *gradients]

    with kernels.using("torch"):
        wanted = step()
    with kernels.using("emulated"):
        got = step()
    assert len(got) == len(wanted) > 10
    for one, other in zip(got, wanted, strict=True):
        assert relative_error(one, other) < 1e-5
