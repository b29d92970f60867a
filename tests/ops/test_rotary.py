"""Rotary positions turn by the formula, and scores depend on distance alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.model import GPTModel
from megatron.mpu import ParallelState
from megatron.mpu.stage import stages
from megatron.ops import kernels
from megatron.ops.rotary import Rotation, rotate, rotation, split_heads
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
KINDS = ("unturned", "turned", "own positions")


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


Heads = tuple[torch.Tensor, ...]


def _split(by: Rotation | None, shared: int, mixed: torch.Tensor) -> Heads:
    if by is not None:
        by = Rotation(*(each.to(mixed.dtype) for each in by))
    return split_heads(mixed, by, shared)


def _by_hand(mixed: torch.Tensor, by: Rotation | None, shared: int) -> Heads:
    query, key, value = mixed.split((shared, 1, 1), dim=3)
    query, key = query.flatten(2, 3), key.squeeze(3)
    if by is not None:
        query, key = rotate(query, by), rotate(key, by)
    return query, key, value.squeeze(3)


def _mixed(s: int, b: int, g: int, shared: int, d: int) -> torch.Tensor:
    return _draw(s, b, g, shared + 2, d)


def _case(shape: tuple[int, ...], kind: str) -> tuple[torch.Tensor, Rotation | None, int]:
    s, b, g, shared, d, r = shape
    by = None if kind == "unturned" else _turn(s, b if kind == "own positions" else 1, r)
    return _mixed(s, b, g, shared, d), by, shared


def _assert_same_function(
    got: Heads, wanted: Heads, inputs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    grads = [_draw(*x.shape, seed=place).to(x) for place, x in enumerate(wanted)]
    (found,) = torch.autograd.grad(got, inputs[0], grads)
    (expected,) = torch.autograd.grad(wanted, inputs[1], grads)
    assert all(map(torch.equal, got, wanted))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_heads_are_split_and_turned_by_the_formula(shape: tuple[int, ...], kind: str) -> None:
    mixed, by, shared = _case(shape, kind)
    one, other = (mixed.to(DEVICE).requires_grad_() for _ in range(2))
    _assert_same_function(split_heads(one, by, shared), _by_hand(other, by, shared), (one, other))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_kernel_equals_twin(dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    mixed, by, shared = _case(shape, kind)
    if by is not None:
        by = Rotation(*(each.to(dtype) for each in by))
    assert_equals_twin(lambda mixed: _split(by, shared, mixed), mixed.to(dtype))


# How the three dims before the channels lie in memory, the outermost first, and with how many
# elements between heads.
LAYOUTS = (((1, 2, 0), 0), ((0, 2, 1), 0), ((1, 2, 0), 8), ((2, 1, 0), 4), ((0, 1, 2), 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("order", "gap"), LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_gradients_may_lie_in_any_way(
    dtype: torch.dtype, order: tuple[int, ...], gap: int, kind: str
) -> None:
    mixed, by, shared = _case((5, 2, 3, 2, 16, 8), kind)
    mixed = mixed.to(DEVICE, dtype)

    def laid_out(grad: torch.Tensor) -> torch.Tensor:
        outer = [grad.size(dim) for dim in order]
        memory = grad.new_zeros(*outer, grad.size(3) + gap)[..., gap:]
        there = memory.permute(*(order.index(dim) for dim in range(3)), 3)
        return there.copy_(grad)

    def joined(grads: list[torch.Tensor]) -> torch.Tensor:
        leaf = mixed.clone().requires_grad_()
        (grad,) = torch.autograd.grad(_split(by, shared, leaf), leaf, grads)
        return grad

    grads = [_draw(5, 2, n, 16, seed=n).to(mixed) for n in (6, 3, 3)]
    with with_kernels():
        wanted, got = joined(grads), joined([laid_out(grad) for grad in grads])
        spread = joined([grad[..., :1].expand_as(grad) for grad in grads])
        assert torch.equal(spread, joined([grad[..., :1].repeat(1, 1, 1, 16) for grad in grads]))
    assert torch.equal(got, wanted)


def test_the_product_need_not_lie_side_by_side_or_at_whole_packs() -> None:
    by = _turn(5, 1, 8)
    mixed = _draw(5, 2, 3, 3, 16).float()

    def shifted(mixed: torch.Tensor) -> Heads:
        there = torch.cat((mixed.new_zeros(1), mixed.flatten()))[1:].view_as(mixed)
        return _split(by, 1, there)

    assert_equals_twin(shifted, mixed)
    assert_equals_twin(lambda mixed: _split(by, 1, mixed.transpose(1, 2)), mixed)
    cos, sin = (torch.cat((each.new_zeros(1), each.flatten()))[1:].view_as(each) for each in by)
    assert_equals_twin(lambda mixed: _split(Rotation(cos, sin), 1, mixed), mixed)


def test_nothing_is_copied_where_nothing_is_turned() -> None:
    mixed = _mixed(3, 2, 4, 1, 8).float().to(DEVICE)
    with with_kernels():
        for part, whole in zip(split_heads(mixed, None, 1), mixed.unbind(3), strict=True):
            assert part.data_ptr() == whole.data_ptr() and part.stride() == whole.stride()


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_is_one_launch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed, by, shared = _case((3, 2, 2, 1, 8, 4), kind)
    mixed = mixed.float().to(DEVICE).requires_grad_()
    with with_kernels():
        parts = _split(by, shared, mixed)
        operators = _Operators()
        with operators:
            torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])
    made = [name for name in operators.names if name not in ("ones_like", "detach")]
    assert made == ["join_heads"]


def test_values_and_other_channels_keep_their_bits() -> None:
    mixed = _draw(3, 2, 2, 3, 16).bfloat16().to(DEVICE)
    mixed[:, :, :, -1] = torch.inf
    mixed[..., 8:] = torch.inf
    with with_kernels():
        query, key, value = _split(_turn(3, 1, 8), 1, mixed)
    assert torch.equal(value, mixed[..., -1, :])
    for turned, before in ((query, mixed[..., 0, :]), (key, mixed[..., 1, :])):
        assert torch.equal(turned[..., 8:], before[..., 8:])
        assert bool(turned[..., :8].isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [1, 2])
def test_the_gradient_is_turned_back(shared: int, kind: str) -> None:
    mixed, by, _ = _case((3, 2, 2, shared, 4, 2), kind)
    mixed.requires_grad_()
    assert torch.autograd.gradcheck(lambda mixed: split_heads(mixed, by, shared), mixed)
    assert torch.autograd.gradgradcheck(lambda mixed: split_heads(mixed, by, shared), mixed)


def test_a_gradient_may_be_missing() -> None:
    mixed = _mixed(3, 2, 2, 1, 8).float().to(DEVICE).requires_grad_()
    for by in (None, _turn(3, 1, 4)):
        with with_kernels():
            (grad,) = torch.autograd.grad(_split(by, 1, mixed)[1].sum(), mixed)
        assert bool(grad[..., 1, :].any()) and not bool(grad[..., ::2, :].any())


@pytest.mark.parametrize("choice", ["torch", "emulated"])
@pytest.mark.parametrize("turns", [False, True])
def test_are_operators(choice: str, turns: bool) -> None:
    mixed = _draw(4, 2, 2, 4, 8).float().requires_grad_()
    cos, sin = (each.float().cpu() for each in _turn(4, 2, 6)) if turns else (None, None)
    with kernels.using(choice):
        for back in (False, True):
            opcheck(torch.ops.megatron.split_heads.default, (mixed, cos, sin, 2, back))
            parts = [x.detach().clone().requires_grad_() for x in _by_hand(mixed, None, 2)]
            opcheck(torch.ops.megatron.join_heads.default, (*parts, cos, sin, back))


def test_nothing_is_turned_to_nothing() -> None:
    mixed = torch.zeros(4, 0, 2, 3, 8, device=DEVICE, requires_grad=True)
    with with_kernels():
        query, key, value = _split(_turn(4, 1, 8), 1, mixed)
        (query + key + value).sum().backward()
    assert query.shape == key.shape == value.shape == (4, 0, 2, 8)
    assert mixed.grad is not None and mixed.grad.shape == mixed.shape


class _Operators(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize(
    "positions",
    [
        {"position_embedding_type": "learned_absolute"},
        {"position_embedding_type": "rope"},
        {"position_embedding_type": "rope", "rotary_percent": 0.5},
    ],
    ids=str,
)
def test_a_model_with_kernels_equals_one_without(positions: dict[str, Any], groups: int) -> None:
    config = small(
        vocab_size=53,
        make_vocab_size_divisible_by=8,
        num_layers=2,
        max_position_embeddings=12,
        seq_length=12,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_query_groups=groups,
        **positions,
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
