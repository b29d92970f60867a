"""Watches a rank's operators and messages, and how much memory its tensors would take.

A `Recorder` stands between PyTorch and its operators. Of every operator on the meta device it notes
what a GPU would have to compute, read and write; of every storage, from when to when it lives.
Operators of this project are one each, as the kernels behind them are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.planner import known_results
from megatron.planner.trace import Communication, Event, Operation, Wait

aten = torch.ops.aten

# Where the factors of a product stand among the arguments; both may have a batch dim in front.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.mm.out: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.addmm_.default: (1, 2),
    aten.addmm.dtype_out: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten._scaled_mm.default: (0, 1),
}
# Only change tensors, and PyTorch cannot call them on meta, where there is nothing to change.
_UNKNOWN_TO_META = (aten._fused_sgd_.default,)
# Products of a fused attention: scores and context; backward the scores again, and four gradients.
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5
_WITHOUT_READING = ("zero_", "fill_", "zeros", "ones", "full", "zeros_like", "ones_like", "arange")
_NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_")


class Recorder(TorchDispatchMode):
    """Notes events, and counts the bytes of living tensors, while it is entered.

    Attributes:
        events: what has happened since the last `take`.
        live: bytes of the storages that live and are no messages.
        peak: the most of `live` since the last `take`.
        received: bytes of the messages that were received, or will be, and live.
        passed_on: whether since then a message has been sent in the memory of one received.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.live = self.peak = self.received = 0
        self.passed_on = False
        self.names: dict[dist.ProcessGroup, str] = {}
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._received: dict[int, int] = {}
        self._last_made, self._peak_before = 0, 0
        self._communications = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is ever compiled, and to see to that PyTorch would load its compiler.
        return False

    def take(self) -> tuple[tuple[Event, ...], int]:
        """The events and the peak since the last call; both begin anew."""
        taken = tuple(self.events), self.peak
        self.events, self.peak, self.passed_on = [], self.live, False
        return taken

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = None if func in _UNKNOWN_TO_META else known_results.call(func, args, kwargs)
        inputs = [t for t in _tensors((args, kwargs)) if t.is_meta]
        outputs = [t for t in _tensors(result) if t.is_meta]
        if inputs or outputs:
            self._note(func, args, inputs, outputs)
        return result

    def communicate(
        self, kind: str, group: dist.ProcessGroup, ranks: tuple[int, ...], tensor: Tensor
    ) -> int:
        """As `megatron.planner.world.Witness`; a message's memory is counted by the schedule."""
        self._communications += 1
        name = self.names.get(group, "world")
        size = tensor.numel() * tensor.element_size()
        number = self._communications
        self.events.append(Communication(kind, name, tuple(sorted(ranks)), size, number))
        if kind in ("send", "recv") and name == "pipeline":
            self._forget(tensor.untyped_storage(), is_received=kind == "recv")
        return number

    def wait(self, number: int) -> None:
        """As `megatron.planner.world.Witness`."""
        self.events.append(Wait(number))

    def _note(
        self, func: Any, args: tuple[Any, ...], inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        made = [t for t in outputs if t.untyped_storage()._cdata not in known]
        for tensor in made:
            self._remember(tensor.untyped_storage())
        changes = func._schema.is_mutable
        if not made and not changes:
            return  # a view
        name = func._schema.name.replace("::", ".")
        short = name.partition(".")[2]
        if short in _NOTHING:
            return
        written = made + [t for t in _changed(func, args) if t.is_meta] if changes else made
        read = [] if short in _WITHOUT_READING else inputs
        moved = sum(map(_bytes, read)) + sum(map(_bytes, written))
        self.events.append(_operation(func, name, args, moved))

    def _remember(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes or size == 0:
            return
        self._sizes[key] = size
        self._alive[key] = weakref.ref(storage, self._at_the_end(key))
        self.live += size
        self._last_made, self._peak_before = key, self.peak
        self.peak = max(self.peak, self.live)

    def _at_the_end(self, key: int) -> Callable[[object], None]:
        own = weakref.ref(self)

        def end(_: object) -> None:
            recorder = own()
            if recorder is not None:
                recorder._drop(key)

        return end

    def _forget(self, storage: torch.UntypedStorage, *, is_received: bool) -> None:
        key = storage._cdata
        if key in self._received:
            self.passed_on = True
            return
        if is_received and key == self._last_made:
            self.peak = self._peak_before  # it was never part of what is counted here
        self._drop(key)
        self._sizes[key] = 0
        self._alive[key] = weakref.ref(storage, self._at_the_end(key))
        if is_received:
            self._received[key] = storage.nbytes()
            self.received += storage.nbytes()

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        self.received -= self._received.pop(key, 0)
        self._alive.pop(key, None)


def _operation(func: Any, name: str, args: tuple[Any, ...], moved: int) -> Operation:
    if func in _PRODUCTS:
        a, b = (args[place] for place in _PRODUCTS[func])
        batch = a.size(0) if a.dim() == 3 else 1
        shape = (batch, a.size(-2), b.size(-1), a.size(-1))
        return Operation(name, "matmul", 2.0 * prod(shape), moved, shape, _format(a))
    if "attention" in name and "softmax" not in name:
        return _attention(func, name, args, moved)
    dtype = next((_format(t) for t in _tensors(args)), "")
    return Operation(name, "memory", 0.0, moved, (), dtype)


def _attention(func: Any, name: str, args: tuple[Any, ...], moved: int) -> Operation:
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    query, key = named["query"], named["key"]
    if query.dim() == 3:  # rows of one document each, laid one behind the other: [b s, n, d]
        s, z, d = named["max_q"], named["max_k"], query.size(2)
        heads = query.size(0) // s * query.size(1)
    else:
        b, n, s, d = query.shape
        z, heads = key.size(2), b * n
    products = _BACKWARD_PRODUCTS if "backward" in name else _FORWARD_PRODUCTS
    flops = 2.0 * products * heads * s * z * d
    shape = (heads, s, z, d)
    causal = bool(named.get("is_causal", False))
    return Operation(name, "attention", flops, moved, shape, _format(query), causal)


def _format(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> int:
    """Of its elements; one that is repeated by a stride of 0 is there once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _changed(func: Any, args: tuple[Any, ...]) -> Iterator[Tensor]:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
