"""All-gather and reduce-scatter by direct exchange, for gloo.

Every rank sends each other one its part at once, and sums what it receives in the order of the
ranks. That moves what the algorithm needs, 1 - 1/size of a tensor in and out of each rank, where
gloo's own reduce-scatter moves several times as much; and the order of the sum is always the same.
Tensors of an accelerator are exchanged in the host's memory (`megatron.mpu.staging`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron.mpu.parallel_state import Axis
from megatron.mpu.staging import goes_through_host, on_host, room_on_host, uses_gloo
from megatron.mpu.watchdog import What, waiting


def wait_for(what: str, axis: Axis) -> What:
    """The sentence that says what this rank waits for, made when it is needed."""

    def sentence() -> str:
        ranks = ", ".join(map(str, axis.ranks))
        return f"rank {axis.ranks[axis.rank]} waits for {what} over ranks {ranks}"

    return sentence


class Pending:
    """A collective under way.

    ``what`` names what this rank waits for; ``held`` is kept alive until it is over; ``finish``
    makes the result of what has arrived.
    """

    def __init__(
        self,
        result: torch.Tensor,
        works: Sequence[dist.Work] = (),
        *,
        what: What = "",
        held: object = None,
        finish: Callable[[], object] | None = None,
    ) -> None:
        self._result = result
        self._works = works
        self._what = what
        self._held = held
        self._finish = finish

    def wait(self) -> torch.Tensor:
        """The result, once it is there; with NCCL the device's stream waits, not the host."""
        if self._works:
            with waiting(self._what):
                for work in self._works:
                    work.wait()
        if self._finish is not None:
            self._finish()
        self._works, self._held, self._finish = (), None, None
        return self._result


def is_better(axis: Axis) -> bool:
    """Whether the axis communicates by gloo."""
    return uses_gloo(axis.group)


def start_all_gather(tensor: torch.Tensor, axis: Axis, out: torch.Tensor) -> Pending:
    """[n, ...] on each rank -> ``out`` [n * size, ...]."""
    if goes_through_host(tensor, axis.group):
        return _on_host(_start_all_gather, tensor, axis, out)
    return _start_all_gather(tensor, axis, out)


def start_reduce_scatter(tensor: torch.Tensor, axis: Axis, out: torch.Tensor) -> Pending:
    """[n * size, ...] on each rank -> ``out`` [n, ...], this rank's part of the sum."""
    if goes_through_host(tensor, axis.group):
        return _on_host(_start_reduce_scatter, tensor, axis, out)
    return _start_reduce_scatter(tensor, axis, out)


def _on_host(
    start: Callable[[torch.Tensor, Axis, torch.Tensor], Pending],
    tensor: torch.Tensor,
    axis: Axis,
    out: torch.Tensor,
) -> Pending:
    """``start`` on copies in the host's memory; what comes of it goes to ``out``."""
    under_way = start(on_host(tensor), axis, room_on_host(out))
    return Pending(out, finish=lambda: out.detach().copy_(under_way.wait()))


def _start_all_gather(tensor: torch.Tensor, axis: Axis, out: torch.Tensor) -> Pending:
    pieces = out.chunk(axis.size)
    own = pieces[axis.rank]
    works = _exchange(axis, [tensor] * axis.size, list(pieces))
    if own.data_ptr() != tensor.data_ptr():
        own.copy_(tensor)
    return Pending(out, works, what=wait_for("an all-gather", axis), held=tensor)


def _start_reduce_scatter(tensor: torch.Tensor, axis: Axis, out: torch.Tensor) -> Pending:
    pieces = list(tensor.chunk(axis.size))
    received = [torch.empty_like(pieces[0]) for _ in range(axis.size)]
    received[axis.rank] = pieces[axis.rank]
    works = _exchange(axis, pieces, received)

    def add_up() -> None:
        total = received[0] + received[1]
        for piece in received[2:]:
            total += piece
        out.copy_(total)

    what = wait_for("a reduce-scatter", axis)
    return Pending(out, works, what=what, held=tensor, finish=add_up)


def _exchange(
    axis: Axis, sent: Sequence[torch.Tensor], received: Sequence[torch.Tensor]
) -> list[dist.Work]:
    """Send the i-th of ``sent`` to the i-th other rank and receive its piece for this one."""
    works = []
    # Beginning with the next rank, not with the first, so that no rank is everybody's first.
    for step in range(1, axis.size):
        source = (axis.rank - step) % axis.size
        target = (axis.rank + step) % axis.size
        works.append(dist.irecv(received[source], axis.ranks[source], group=axis.group))
        works.append(dist.isend(sent[target], axis.ranks[target], group=axis.group))
    return [work for work in works if work is not None]
