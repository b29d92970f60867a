"""Registers an operator with PyTorch, once, with its kernel and its twin.

An operator `megatron::name` has a kernel for CUDA and a twin in plain PyTorch, which is its
specification: it runs on every other device, on the CPU too unless the kernels are emulated there,
and what is known of the results without computing them, as `torch.compile` and meta tensors need
it, comes from it as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.ops import kernels

_LIBRARY = torch.library.Library("megatron", "DEF")


def operator(
    schema: str, *, kernel: Callable[..., Any], twin: Callable[..., Any]
) -> Callable[..., Any]:
    """Define the operator that `schema` describes, such as "double(Tensor x) -> Tensor".

    Args:
        kernel: computes the result by launches; called only with tensors that `kernels.active`
            says a kernel takes.
        twin: computes the same from any tensors, and with results of the same shapes, formats and
            strides.
    """
    name = schema.partition("(")[0]

    def chosen(*arguments: Any) -> Any:
        tensor = next(a for a in arguments if isinstance(a, Tensor))
        return kernel(*arguments) if kernels.active(tensor) else twin(*arguments)

    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, chosen, key)
    torch.library.register_fake(f"megatron::{name}", twin, lib=_LIBRARY)
    found: Callable[..., Any] = getattr(torch.ops.megatron, name).default
    return found


def differentiable(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Say how an operator is differentiated, as `torch.library.register_autograd` takes it."""
    torch.library.register_autograd(
        f"megatron::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )
