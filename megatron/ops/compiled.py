"""What lies between matrix products, compiled by PyTorch where the run asks for it (`--compile`).

A function marked `fusable` is pure: tensors and plain numbers in, tensors out, a few elementwise
operations and sums over rows that one pass over memory could do. With `--compile` it runs through
`torch.compile`, which makes that one pass and, from what autograd would do, another for the
backward pass. Without it the function runs as it is written. Where a kernel of this project does
the same, its caller goes there, and the marked function is not reached.

Each shape is compiled by itself, at its first call; training has few.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from megatron.errors import ConfigError

_P = ParamSpec("_P")
_R = TypeVar("_R")

_enabled = False


def choose(enabled: bool, device: torch.device) -> None:
    """Compile marked functions from now on, or run them as they are written.

    Raises:
        ConfigError: they cannot be compiled here.
    """
    global _enabled
    if enabled and (missing := _missing(device)):
        raise ConfigError(f"--compile needs {missing}, which is not here")
    _enabled = enabled


@contextmanager
def using(enabled: bool, device: torch.device | str = "cpu") -> Iterator[None]:
    """Another choice within the `with` block."""
    global _enabled
    before = _enabled
    choose(enabled, torch.device(device))
    try:
        yield
    finally:
        _enabled = before


def _missing(device: torch.device) -> str | None:
    """What PyTorch's compiler would ask for in vain."""
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        return "triton"
    on_cpu = device.type == "cpu"
    variable, compilers = ("CXX", ("g++", "clang++")) if on_cpu else ("CC", ("gcc", "clang"))
    named = os.environ.get(variable)
    found = any(shutil.which(each) for each in ((named,) if named else compilers))
    return None if found else f"a compiler ({variable} or {compilers[0]})"


def fusable(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Mark a pure function of tensors as one that PyTorch may compile."""

    # The compiler is loaded, which takes seconds, where it is first asked for.
    @functools.cache
    def compiled() -> Callable[_P, _R]:
        return torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def chosen(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # One that is being compiled takes the marked functions that it calls into itself.
        if _enabled and not torch.compiler.is_compiling():
            return compiled()(*args, **kwargs)
        return function(*args, **kwargs)

    return chosen
