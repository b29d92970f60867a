"""On the CPU, what holds of a GPU: nobody may wait for it, and its graphs run no Python.

`no_waiting` fails at operators that bring a value or a size from the device to the host.
`OperatorGraphs` records operators with the very tensors that they read and write, as a CUDA graph
does, and runs nothing but these when it replays them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.model import bert_model, t5_model
from megatron.training.graphs import Recording
from megatron.training.task import Parts

_WAITING = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class WouldWaitError(AssertionError):
    """The host would wait for a GPU here."""


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        if name in _WAITING:
            raise WouldWaitError(name)
        if name in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise WouldWaitError(f"{name} by a mask")
        return func(*args, **kwargs or {})


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it the host may not wait for a device, as if all tensors were on one.

    `padding_mask` looks into the mask on the CPU, and only there: its other branch is taken.
    """

    def refuse(tensor: Tensor) -> Any:
        raise WouldWaitError("tolist or numpy")

    with pytest.MonkeyPatch.context() as patch, _NoWaiting():
        for module in (bert_model, t5_model):
            patch.setattr(module, "padding_mask", lambda real: real[:, None, None, :])
        for name in ("tolist", "numpy"):
            patch.setattr(Tensor, name, refuse)
        yield


class _Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            aliases = [r.alias_info for r in func._schema.returns]
            if any(alias is not None and not alias.is_write for alias in aliases):
                continue  # a view, which sees what is written into its base
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class OperatorGraphs:
    """Records work on the CPU; recording leaves no trace in `buffers`, as it would on a GPU."""

    def __init__(self, buffers: Callable[[], Sequence[Tensor]]) -> None:
        self._buffers = buffers
        self.count = self.replays = 0

    def __call__(self, work: Callable[[], Parts]) -> Recording:
        before = [buffer.clone() for buffer in self._buffers()]
        with no_waiting(), _Recorded() as recorded:
            parts = work()
        for buffer, values in zip(self._buffers(), before, strict=True):
            buffer.copy_(values)
        for value in parts.values():
            value.fill_(float("nan"))
        self.count += 1

        def replay() -> None:
            self.replays += 1
            recorded.replay()

        return Recording(parts, replay)
