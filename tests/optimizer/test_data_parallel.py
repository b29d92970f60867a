"""Gradient buffers and optimizer over several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.mpu.collectives import start_all_reduce
from megatron.mpu.direct import Pending
from megatron.mpu.init import normal
from megatron.mpu.parallel_state import Axis, ParallelState
from megatron.mpu.shard_spec import ShardSpec
from megatron.mpu.topology import Topology
from megatron.optimizer import GradientBuffers, build_optimizer
from tests.distributed import distributed, run_distributed
from tests.optimizer.support import (
    SEED,
    Net,
    accumulate_gradients,
    make_config,
    micro_batches,
    plain_parameter,
)

BUCKET_SIZE = 300
STEPS = 4
MICRO_BATCHES = 4


def train(state: ParallelState, dtype: torch.dtype) -> tuple[list[float], list[Tensor]]:
    """Gradient norms and final weights of a few steps; each data rank takes its micro-batches."""
    net = Net(state, dtype)
    config = make_config(
        bf16=dtype == torch.bfloat16, bucket_size=BUCKET_SIZE, clip_grad=0.05, weight_decay=0.1
    )
    optimizer = build_optimizer(config, [net], state)
    norms = []
    for step in range(STEPS):
        own = micro_batches(MICRO_BATCHES, step)[state.data.rank :: state.data.size]
        accumulate_gradients(optimizer.gradients, net, own, MICRO_BATCHES)
        norms.append(optimizer.step(0.01).grad_norm.item())
    return norms, [p.detach() for p in net.parameters()]


def train_on_a_rank(dtype: torch.dtype) -> tuple[list[float], list[Tensor]]:
    state = ParallelState.create(Topology(dist.get_world_size()))
    result = train(state, dtype)
    state.destroy()
    return result


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_data_parallel_equals_one_process(
    world_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    norms, weights = train(ParallelState.single(), dtype)
    results = run_distributed(world_size, train_on_a_rank, dtype)
    for rank_norms, rank_weights in results:
        assert rank_norms == pytest.approx(norms, rel=tolerance)
        for own, expected in zip(rank_weights, weights, strict=True):
            assert ((own - expected).abs().max() / expected.abs().max()).item() < tolerance
    for _, rank_weights in results[1:]:
        for own, first in zip(rank_weights, results[0][1], strict=True):
            assert torch.equal(own, first)


@contextmanager
def recorded(events: list[Any]) -> Iterator[None]:
    """Note the size of every bucket whose all-reduce starts."""

    def spy(tensor: Tensor, axis: Axis) -> Pending:
        events.append(tensor.numel())
        return start_all_reduce(tensor, axis)

    with mock.patch("megatron.optimizer.reduction.start_all_reduce", spy):
        yield


class Tower(nn.Module):
    """Square layers applied in a given order, each with its own bucket size to be told by."""

    def __init__(self, state: ParallelState, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ParameterList(
            plain_parameter(f"layer{i}", (8, width), state, torch.float64, normal(0.3, SEED))
            for i, width in enumerate(widths)
        )

    def forward(self, x: Tensor, order: list[int], events: list[Any]) -> Tensor:
        for index in order:
            x = torch.tanh(x @ self.layers[index]) @ self.layers[index].t()
            # Runs in backward when the gradient has come back to this layer's output.
            x.register_hook(lambda _, index=index: events.append(f"layer {index}"))
        return x.square().sum()


WIDTHS = [128, 256, 384]  # 1, 2 and 3 rows of the buffer


@distributed(2)
def test_buckets_start_while_backward_runs() -> None:
    state = ParallelState.create(Topology(2))
    net = Tower(state, WIDTHS)
    gradients = GradientBuffers([net], state, bucket_size=1)
    events: list[Any] = []
    with recorded(events):
        gradients.zero()
        x = torch.ones(2, 8, dtype=torch.float64, requires_grad=True)
        for last in (False, True):
            loss = net(x, [0, 1, 2], events)
            if last:
                gradients.on_last_backward(0)
            loss.backward()
        events.append("end of backward")
        gradients.finish()
    backward = ["layer 2", "layer 1", "layer 0"]
    assert events == [
        *backward,
        *("layer 2", 3072, "layer 1", 2048, "layer 0", 1024),
        "end of backward",
    ]
    state.destroy()


@distributed(2)
def test_collectives_keep_one_order_whatever_the_gradients_do() -> None:
    state = ParallelState.create(Topology(2))
    net = Tower(state, WIDTHS)
    gradients = GradientBuffers([net], state, bucket_size=1)
    events: list[Any] = []
    order = [0, 1, 2] if state.rank == 0 else [2, 1]  # rank 1 leaves layer 0 out
    with recorded(events):
        gradients.zero()
        x = torch.ones(2, 8, dtype=torch.float64)
        loss = net(x.requires_grad_(), order, [])
        gradients.on_last_backward(0)
        loss.backward()
        early = list(events)
        gradients.finish()
    assert events == [3072, 2048, 1024]
    assert early == ([3072, 2048, 1024] if state.rank == 0 else [3072, 2048])
    expected = torch.zeros(2, dtype=torch.float64)
    expected[state.rank] = gradient_of_layer_1(net, x, order).sum()
    dist.all_reduce(expected)
    assert net.layers[1].main_grad.sum().item() == pytest.approx(expected.sum().item(), rel=1e-12)
    state.destroy()


def gradient_of_layer_1(net: Tower, x: Tensor, order: list[int]) -> Tensor:
    (gradient,) = torch.autograd.grad(net(x, order, []), [net.layers[1]])
    return gradient


@distributed(2)
def test_a_bucket_of_two_chunks_waits_for_both() -> None:
    state = ParallelState.create(Topology(2))
    chunks = [Tower(state, [128]), Tower(state, [256])]
    gradients = GradientBuffers(chunks, state, bucket_size=1 << 20)
    events: list[Any] = []
    with recorded(events):
        gradients.zero()
        x = torch.ones(2, 8, dtype=torch.float64, requires_grad=True)
        gradients.on_last_backward(1)
        chunks[1](x, [0], []).backward()
        chunks[0](x, [0], []).backward()  # not the last of its chunk
        assert events == []
        gradients.on_last_backward(0)
        chunks[0](x, [0], []).backward()
        assert events == [3072]
        gradients.finish()
    assert events == [3072]
    state.destroy()


@distributed(2)
def test_a_parameter_of_two_chunks_waits_for_the_first() -> None:
    state = ParallelState.create(Topology(2))
    chunks = [Tower(state, [128]), Tower(state, [128])]
    chunks[1].layers = chunks[0].layers
    gradients = GradientBuffers(chunks, state, bucket_size=1)
    events: list[Any] = []
    with recorded(events):
        gradients.zero()
        x = torch.ones(2, 8, dtype=torch.float64, requires_grad=True)
        gradients.on_last_backward(1)
        chunks[1](x, [0], []).backward()
        assert events == []
        gradients.on_last_backward(0)
        chunks[0](x, [0], []).backward()
        assert events == [1024]
        gradients.finish()
    state.destroy()


@distributed(2)
def test_buckets_of_different_buffers_start_in_backward_order() -> None:
    state = ParallelState.create(Topology(2))
    chunk = nn.Module()
    # The second lies between the other two in time, but without decay in a buffer of its own.
    for name, shape in (("first", (8, 128)), ("second", (1040,)), ("third", (8, 384))):
        parameter = plain_parameter(name, shape, state, torch.float64, normal(0.3, SEED))
        setattr(chunk, name, parameter)
    gradients = GradientBuffers([chunk], state, bucket_size=1)
    events: list[Any] = []
    with recorded(events):
        gradients.finish()
    assert events == [3072, 2048, 1024]
    state.destroy()


class EndStage(nn.Module):
    """First or last stage of a pipeline: its embedding, and something of its own before it."""

    def __init__(self, state: ParallelState) -> None:
        super().__init__()
        last = state.pipeline.rank > 0
        draw = normal(0.2, SEED)
        if last:  # the copy then lies elsewhere in its buffer than the owner in its own
            self.own = plain_parameter("own", (3, 5), state, torch.float32, draw)
        spec = ShardSpec("head.embedding", (30, 7), tied_to="embedding")
        self.embedding = plain_parameter("embedding", (30, 7), state, torch.float32, draw)
        if last:
            self.embedding.shard_spec = spec  # type: ignore[attr-defined]
        self.bias = plain_parameter(f"bias{state.pipeline.rank}", (7,), state, torch.float32, draw)


def stage_gradient(parameter: nn.Parameter, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(step * 100 + rank * 10 + parameter.dim())
    return torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("world_size", [2, 4])
def test_tied_copies_stay_equal(world_size: int) -> None:
    run_distributed(world_size, train_tied_copies)


def train_tied_copies() -> None:
    state = ParallelState.create(Topology(dist.get_world_size(), pipeline=2))
    stage = EndStage(state)
    optimizer = build_optimizer(make_config(weight_decay=0.1, clip_grad=0.5), [stage], state)
    for step in range(STEPS):
        optimizer.gradients.zero()
        for parameter in stage.parameters():
            parameter.main_grad.copy_(stage_gradient(parameter, step, state.rank))
        optimizer.gradients.finish()
        expected = sum(stage_gradient(stage.embedding, step, r) for r in range(state.world_size))
        assert torch.allclose(stage.embedding.main_grad, expected, rtol=1e-5, atol=1e-6)
        squares = torch.zeros((), dtype=torch.float64)
        for parameter in stage.parameters():
            if parameter.shard_spec.tied_to is None:
                squares += parameter.main_grad.double().square().sum()
        dist.all_reduce(squares, group=state.model.group)
        norm = optimizer.step(0.01).grad_norm
        assert norm.item() == pytest.approx(squares.sqrt().item(), rel=1e-6)
        copies = [torch.empty_like(stage.embedding) for _ in range(state.world_size)]
        dist.all_gather(copies, stage.embedding.detach())
        assert all(torch.equal(copy, stage.embedding) for copy in copies)
    assert optimizer.parameter_count() == 30 * 7 + 3 * 5 + 2 * 7
    specs = {key: spec for key, _, spec, _ in optimizer.state_tensors()}
    tied = specs["optimizer.exp_avg.embedding"].tied_to
    assert tied == (None if state.pipeline.rank == 0 else "embedding")


@distributed(4)
def test_each_copy_is_summed_over_its_own_group() -> None:
    # Encoder 0, decoder 1 to 3: words on 0, 1 and 3, positions on 0 and 1.
    state = ParallelState.create(Topology(4, pipeline=4))
    members = {"words": (0, 1, 3), "positions": (0, 1)}
    axes = {}
    chunk = nn.Module()
    for name, ranks in members.items():
        group = dist.new_group(list(ranks))
        axes[name] = None
        if state.rank in ranks:
            axes[name] = Axis(ranks, ranks.index(state.rank), group)
            parameter = plain_parameter(name, (5, 5), state, torch.float32, normal(0.2, SEED))
            if state.rank > 0:
                parameter.shard_spec = ShardSpec(f"copy.{name}", (5, 5), tied_to=name)
            setattr(chunk, name, parameter)
    chunk.own = plain_parameter("own", (3,), state, torch.float32, normal(0.2, SEED))
    state = replace(state, embedding=axes["words"], position_embedding=axes["positions"])
    gradients = GradientBuffers([chunk], state, BUCKET_SIZE)
    for parameter in chunk.parameters():
        parameter.main_grad.fill_(10.0**state.rank)
    gradients.finish()
    for name, ranks in members.items():
        if state.rank in ranks:
            assert (getattr(chunk, name).main_grad == sum(10.0**rank for rank in ranks)).all()
    assert (chunk.own.main_grad == 10.0**state.rank).all()


@distributed(2)
def test_untied_stages_share_nothing() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    layer = plain_parameter(f"layer{state.rank}", (4, 4), state, torch.float32, normal(0.2, SEED))
    chunk = nn.Module()
    chunk.layer = layer
    gradients = GradientBuffers([chunk], state, BUCKET_SIZE)
    layer.main_grad.fill_(state.rank + 1)  # type: ignore[attr-defined]
    gradients.finish()
    assert (layer.main_grad == state.rank + 1).all()  # type: ignore[attr-defined]
    state.destroy()


@distributed(2)
def test_partial_gradients_are_summed_over_the_tensor_ranks() -> None:
    state = ParallelState.create(Topology(2, tensor=2))
    chunk = nn.Module()
    for name in ("partial", "whole"):
        parameter = plain_parameter(name, (5,), state, torch.float32, normal(0.2, SEED))
        parameter.shard_spec = ShardSpec(name, (5,), partial=name == "partial")
        setattr(chunk, name, parameter)
    gradients = GradientBuffers([chunk], state, BUCKET_SIZE)
    for parameter in chunk.parameters():
        parameter.main_grad.fill_(state.rank + 1)
    gradients.finish()
    assert (chunk.partial.main_grad == 3).all()
    assert (chunk.whole.main_grad == state.rank + 1).all()
    state.destroy()


@distributed(2)
def test_one_rank_with_a_bad_gradient_stops_all() -> None:
    state = ParallelState.create(Topology(2, tensor=2))
    net = Net(state)
    optimizer = build_optimizer(make_config(), [net], state)
    before = [p.detach().clone() for p in net.parameters()]
    for parameter in net.parameters():
        parameter.main_grad.fill_(1.0)
    if state.rank == 1:
        net.wide.weight.main_grad[0, 0] = float("nan")
    assert optimizer.step(0.01).skipped
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    state.destroy()
