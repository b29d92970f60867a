"""What an operator of this project returns on the meta device, worked out once for each shape.

On the meta device an operator's twin runs in full, and only the shapes of its results are wanted.
A model takes the same few operators in every layer, every micro-batch and both steps of a
recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "megatron"
# Arguments on which no shape depends.
_IMMATERIAL = ("number",)

_known: dict[Any, Callable[[], Any]] = {}


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`, where it need not be run for it without running it.

    Only operators of this project that change no argument are known: their results are new tensors
    of contiguous or given strides, whatever the values.
    """
    if func.namespace != NAMESPACE or func._schema.is_mutable or kwargs or not _is_meta(args):
        return func(*args, **kwargs)
    names = (argument.name for argument in func._schema.arguments)
    key = (
        func,
        *(
            _described(value)
            for name, value in zip(names, args, strict=False)
            if name not in _IMMATERIAL
        ),
    )
    if key in _known:
        return _known[key]()
    result = func(*args)
    _known[key] = _maker(result)
    return result


def _is_meta(args: tuple[Any, ...]) -> bool:
    return all(value.is_meta for value in args if isinstance(value, Tensor))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return tuple(map(_described, value)) if isinstance(value, list | tuple) else value


def _maker(result: Any) -> Callable[[], Any]:
    """Makes tensors like the result's."""
    if isinstance(result, Tensor):
        shape, strides, dtype = result.shape, result.stride(), result.dtype
        return lambda: torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    if isinstance(result, list | tuple):
        kind, makers = type(result), [_maker(each) for each in result]
        return lambda: kind(maker() for maker in makers)
    return lambda: result
