"""Parameters that arrive beside the next forward pass are there when they are used."""

from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from megatron.mpu.collectives import start_all_gather
from megatron.mpu.direct import Pending
from megatron.mpu.init import normal
from megatron.mpu.parallel_state import Axis, ParallelState
from megatron.mpu.topology import Topology
from megatron.optimizer import Optimizer, build_optimizer
from tests.distributed import distributed
from tests.optimizer.support import SEED, make_config, plain_parameter

WIDTHS = [256, 512, 768]  # 2, 4 and 6 thousand elements


class Layer(nn.Module):
    def __init__(self, index: int, state: ParallelState) -> None:
        super().__init__()
        shape, draw = (8, WIDTHS[index]), normal(0.3, SEED)
        self.weight = plain_parameter(f"layer{index}", shape, state, torch.float64, draw)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) @ self.weight.t()


class Head(nn.Module):
    """Owns a weight that another module uses; is never called itself."""

    def __init__(self, state: ParallelState) -> None:
        super().__init__()
        draw = normal(0.3, SEED)
        self.weight = plain_parameter("head", (8, 1024), state, torch.float64, draw)


class Tower(nn.Module):
    def __init__(self, state: ParallelState, events: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(index, state) for index in range(3))
        self.head = Head(state)
        self.events = events

    def forward(self, x: Tensor) -> Tensor:
        self.events.append("begins")
        for index, layer in enumerate(self.layers):
            x = layer(x)
            self.events.append(f"layer {index} is done")
        return (x @ self.head.weight).square().sum()


class Late(Pending):
    """An all-gather that does not begin until somebody waits for it."""

    def __init__(self, tensor: Tensor, axis: Axis, out: Tensor, events: list[Any]) -> None:
        super().__init__(out)
        self.tensor, self.axis, self.out, self.events = tensor, axis, out, events

    def wait(self) -> Tensor:
        self.events.append(self.out.numel() // 1024)
        return start_all_gather(self.tensor, self.axis, self.out).wait()


def build(state: ParallelState, *, distributed: bool) -> tuple[Tower, Optimizer, list[Any]]:
    events: list[Any] = []
    tower = Tower(state, events)
    config = make_config(bucket_size=1, distributed=distributed, clip_grad=0.5)
    return tower, build_optimizer(config, [tower], state), events


def backward(tower: Tower, optimizer: Optimizer, rank: int) -> float:
    """One forward and backward; the loss."""
    optimizer.gradients.zero()
    x = torch.full((2, 8), 1.0 + rank, dtype=torch.float64, requires_grad=True)
    optimizer.gradients.on_last_backward(0)
    loss = tower(x)
    loss.backward()
    optimizer.gradients.finish()
    return float(loss.detach())


@distributed(2)
def test_each_module_waits_for_what_it_owns() -> None:
    state = ParallelState.create(Topology(2))
    tower, optimizer, events = build(state, distributed=True)
    plain_tower, plain, _ = build(state, distributed=False)

    def late(tensor: Tensor, axis: Axis, out: Tensor) -> Late:
        return Late(tensor, axis, out, events)

    with mock.patch("megatron.optimizer.gather.start_all_gather", late):
        for step in range(3):
            events.clear()
            loss = backward(tower, optimizer, state.rank)
            assert abs(loss / backward(plain_tower, plain, state.rank) - 1) < 1e-12
            done = [f"layer {index} is done" for index in range(3)]
            if step == 0:
                assert events == ["begins", *done]
            else:
                assert events == [8, "begins", 2, done[0], 4, done[1], 6, done[2]]
            optimizer.step(0.01)
            plain.step(0.01)
            for own, other in zip(tower.parameters(), plain_tower.parameters(), strict=True):
                mine, news = own.flatten().chunk(2), other.flatten().chunk(2)
                for part in range(2):  # the other rank's is still on its way
                    arrived = torch.allclose(mine[part], news[part], rtol=1e-12, atol=1e-14)
                    assert arrived == (part == state.rank)
        optimizer.finish_gather()
    for own, other in zip(tower.parameters(), plain_tower.parameters(), strict=True):
        assert torch.allclose(own, other, rtol=1e-12, atol=1e-14)
    state.destroy()


@distributed(2)
def test_a_step_begins_after_all_gathers_of_the_one_before() -> None:
    state = ParallelState.create(Topology(2))
    tower, optimizer, _ = build(state, distributed=True)
    plain_tower, plain, _ = build(state, distributed=False)
    for _ in range(3):  # no forward pass between the steps
        for shard in (*optimizer.gradients.shards, *plain.gradients.shards):
            shard.gradients.fill_(0.1)
        optimizer.step(0.01)
        plain.step(0.01)
    with torch.no_grad():
        x = torch.ones(2, 8, dtype=torch.float64)
        assert torch.allclose(tower(x), plain_tower(x), rtol=1e-12)
    state.destroy()


def test_the_model_does_not_keep_its_optimizer() -> None:
    state = ParallelState.single()
    tower = Tower(state, [])
    gone = weakref.ref(build_optimizer(make_config(distributed=True), [tower], state).gradients)
    gc.collect()
    assert gone() is None
    assert tower(torch.ones(2, 8, dtype=torch.float64)) > 0
