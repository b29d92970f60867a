"""Dropout keeps the mean, and the backward pass drops what the forward pass dropped."""

from __future__ import annotations

import torch

from megatron.ops.dropout import dropout


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
