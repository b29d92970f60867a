"""Rotary positions turn by the formula, and scores depend on distance alone."""

from __future__ import annotations

import math

import torch

from megatron.ops.rotary import rotate, rotation


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
