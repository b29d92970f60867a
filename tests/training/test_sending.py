"""Micro-batches that are sent ahead are those of the step they are for, and no others are taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron.mpu import ParallelState
from megatron.training import sending
from megatron.training.gpt import GPTPretraining
from megatron.training.sending import Sender
from megatron.training.task import Batch
from megatron.training.trainer import Trainer
from tests.training.tiny import micro_batches, random_samples, tiny_config

SAMPLES = 24
RAMP = {"rampup_batch_size": (4, 4, 10), "global_batch_size": 8, "train_iters": 4}


class _Accelerator:
    """A stream, an event and the current stream of a device that is not here."""

    def __init__(self, device: object = None) -> None:
        self.said: list[str] = []

    def __enter__(self) -> None:
        self.said.append("copies")

    def __exit__(self, *_: object) -> None:
        self.said.append("computes")

    def record_event(self) -> str:
        self.said.append("marked")
        return "event"

    def wait_event(self, event: str) -> None:
        self.said.append(f"waits for {event}")


def _run(ahead: bool) -> tuple[list[list[float]], list[int]]:
    """Losses and norms of the steps, and how many micro-batches were taken at the end of each."""
    config = tiny_config(model={"model_type": "gpt"}, train={"micro_batch_size": 2, **RAMP})
    trainer = Trainer(config, GPTPretraining(config), ParallelState.single())
    trainer._sender.runs_ahead = ahead
    taken = 0

    def batches() -> Iterator[Batch]:
        nonlocal taken
        for batch in micro_batches(random_samples(SAMPLES, 1, "gpt"), 2):
            taken += 1
            yield batch

    found: tuple[list[list[float]], list[int]] = [], []
    for step in trainer.steps(batches()):
        found[0].append([*step.parts.tolist(), step.grad_norm.item()])
        found[1].append(taken)
    return found


def test_sending_ahead_changes_nothing_but_when() -> None:
    (plain, taken), (found, taken_ahead) = _run(False), _run(True)
    assert found == plain
    assert taken == [2, 4, 6, 10]
    assert taken_ahead == [4, 6, 10, 10], "the next step's, however many, and none at the end"


def test_copies_run_beside_and_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(model={"model_type": "gpt"})
    monkeypatch.setattr(torch, "Stream", _Accelerator)
    sender = Sender(GPTPretraining(config), torch.device("cuda"))
    side, main = sender._stream, _Accelerator()
    assert isinstance(side, _Accelerator)
    pinned: list[Any] = []
    monkeypatch.setattr(sender, "_device", "meta")
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    held: list[tuple[torch.Tensor, object]] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: held.append((t, stream)))
    monkeypatch.setattr(sending.torch.accelerator, "current_stream", lambda device: main)

    batch = micro_batches(random_samples(2, 1, "gpt"), 2)[0]
    sent = sender.send([batch, batch])
    assert side.said == ["copies", "marked", "computes"]
    assert main.said == []
    batches, denominators = sent.take()
    assert main.said == ["waits for event"]
    assert denominators.is_meta and denominators.dtype == torch.float64
    for copied in batches:
        assert {name for name, field in copied.items() if not field.is_meta} == {"document_lengths"}
    moved = [denominators, *(f for copied in batches for f in copied.values() if f.is_meta)]
    assert {id(tensor) for tensor, _ in held} == {id(tensor) for tensor in moved}
    assert {stream for _, stream in held} == {main}
    assert len(pinned) == len(moved)
