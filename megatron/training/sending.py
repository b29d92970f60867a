"""A step's micro-batches on their way to the device, beside what it computes.

On an accelerator they are copied from pinned memory on a stream of their own, and nobody waits for
that but the device's main stream, where it first uses them. So the next step's micro-batches arrive
while the present step is computed. On the CPU there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.training.task import Batch, Task


@dataclass(frozen=True)
class Sent:
    """This rank's micro-batches of a step, to be taken once.

    Attributes:
        count: how many there are.
    """

    count: int
    _batches: list[Batch]
    _denominators: Tensor
    _event: torch.Event | None

    def take(self) -> tuple[list[Batch], Tensor]:
        """The micro-batches, and the sum of their denominators, float64 [parts], on the device.

        The device's current stream waits until they are there.
        """
        if self._event is not None:
            stream = torch.accelerator.current_stream(self._denominators.device)
            stream.wait_event(self._event)
            fields = (field for batch in self._batches for field in batch.values())
            for tensor in (self._denominators, *fields):
                if tensor.device.type != "cpu":
                    # It was allocated on the other stream, which may not take it back too early.
                    tensor.record_stream(stream)
        return self._batches, self._denominators


class Sender:
    """Sends what the steps of a task need to `device`.

    Attributes:
        runs_ahead: whether it is worth sending a step's micro-batches before the last one is over.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task, self._device = task, device
        # On meta, where a run is only planned, nothing moves.
        self.runs_ahead = device.type not in ("cpu", "meta")
        self._stream = torch.Stream(device) if self.runs_ahead else None

    def send(self, batches: Sequence[Batch]) -> Sent:
        """Send micro-batches, which are on the host; there is at least one."""
        denominators = torch.stack([self._task.denominators(batch) for batch in batches]).sum(0)
        if self._stream is None:
            return Sent(len(batches), list(batches), denominators, None)
        kept = self._task.host_fields
        with self._stream:
            on_device = [
                {
                    name: field if name in kept else self._copy(field)
                    for name, field in batch.items()
                }
                for batch in batches
            ]
            denominators = self._copy(denominators)
            return Sent(len(batches), on_device, denominators, self._stream.record_event())

    def _copy(self, tensor: Tensor) -> Tensor:
        # From memory that is not pinned the host would wait for the copy.
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        return pinned.to(self._device, non_blocking=True)
