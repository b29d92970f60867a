"""Compiled or not, a marked function and its gradients are the same."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.errors import ConfigError
from megatron.ops import compiled
from megatron.ops.compiled import fusable


@fusable
def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt() * weight


@fusable
def _gelu_of_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(_norm(x, weight, 1e-5) + bias)


def _result_and_gradients() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=generator) for shape in ((5, 33), (33,), (33,))]
    for tensor in inputs:
        tensor.requires_grad_()
    y = _gelu_of_norm(*inputs)
    return y, *torch.autograd.grad(y.square().sum(), inputs)


def test_a_compiled_function_is_the_same_function() -> None:
    expected = _result_and_gradients()
    with compiled.using(True):
        for found, wanted in zip(_result_and_gradients(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("enabled", [False, True])
def test_the_choice_ends_with_its_block(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def take(function: object, **_: object) -> object:
        asked.append(function)
        return function

    monkeypatch.setattr(torch, "compile", take)
    double = fusable(lambda x: 2 * x)
    with compiled.using(enabled):
        assert double(3) == 6
    assert double(4) == 8
    assert len(asked) == enabled


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_missing_is_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: dict[str, object] = {}
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    monkeypatch.setattr(shutil, "which", installed.get)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with compiled.using(False, device):  # asks for nothing
        pass
    missing = {"cpu": ["CXX or g++"], "cuda": ["triton", "CC or gcc"]}[device]
    for name, tool in zip(missing, ("triton", "gcc"), strict=False):
        with pytest.raises(ConfigError, match=f"--compile needs .*{name}"):
            compiled.choose(True, torch.device(device))
        installed[tool] = tool
    installed["g++"] = "g++"
    with compiled.using(False):
        compiled.choose(True, torch.device(device))
