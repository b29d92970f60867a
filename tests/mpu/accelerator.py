"""Exchanges over gloo as an accelerator's tensors have them, where there is no accelerator.

Every tensor is said to be one's, what was copied to the host is told by its memory, and gloo is
watched: it may be given nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mpu import collectives, direct, staging
from megatron.pipeline import p2p

_EXCHANGES = ("all_reduce", "broadcast", "send", "recv", "isend", "irecv")


@contextmanager
def all_tensors_on_an_accelerator() -> Iterator[set[str]]:
    """Within it gloo takes copies on the host alone; gives the exchanges that there were."""
    copies: list[Tensor] = []  # kept, so that their memory is nobody else's
    used: set[str] = set()

    def is_on_host(tensor: Tensor) -> bool:
        memory = tensor.untyped_storage().data_ptr()
        return memory in {copy.untyped_storage().data_ptr() for copy in copies}

    def kept(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def made(tensor: Tensor) -> Tensor:
            copies.append(make(tensor))
            return copies[-1]

        return made

    empty_like = torch.empty_like

    def like(tensor: Tensor, **options: Any) -> Tensor:
        made = empty_like(tensor, **options)
        if is_on_host(tensor):
            copies.append(made)
        return made

    def watched(name: str, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def run(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert is_on_host(tensor)
            used.add(name)
            return exchange(tensor, *args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for module in (staging, collectives, direct, p2p):
            patch.setattr(module, "goes_through_host", lambda tensor, group: group is not None)
            for name in ("on_host", "room_on_host"):
                patch.setattr(module, name, kept(getattr(staging, name)), raising=False)
        patch.setattr(torch, "empty_like", like)
        for name in _EXCHANGES:
            patch.setattr(dist, name, watched(name, getattr(dist, name)))
        yield used
