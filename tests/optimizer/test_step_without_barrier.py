"""Without clipping and loss scaling no stage waits for another one to update its weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron.mpu.init import normal
from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.shard_spec import ShardSpec
from megatron.mpu.topology import Topology
from megatron.optimizer import Optimizer, build_optimizer
from tests.distributed import run_distributed
from tests.optimizer.support import SEED, make_config, plain_parameter

MODES = [{}, {"distributed": True}]


def build(
    state: ParallelState, mode: dict[str, bool], *, tied: bool
) -> tuple[nn.Module, Optimizer]:
    chunk = nn.Module()
    draw = normal(0.2, SEED)
    chunk.own = plain_parameter(f"own{state.pipeline.rank}", (4, 6), state, torch.float32, draw)
    if tied:
        chunk.words = plain_parameter("words", (5, 3), state, torch.float32, draw)
        if state.pipeline.rank > 0:
            chunk.words.shard_spec = ShardSpec("copy", (5, 3), tied_to="words")
    optimizer = build_optimizer(make_config(clip_grad=0.0, **mode), [chunk], state)
    for shard in optimizer.gradients.shards:
        shard.gradients.zero_()
    for parameter in chunk.parameters():
        parameter.main_grad.fill_(state.pipeline.rank + 1.0)  # type: ignore[attr-defined]
    return chunk, optimizer


def step_one_after_the_other(mode: dict[str, bool]) -> None:
    state = ParallelState.create(Topology(dist.get_world_size(), pipeline=2))
    chunk, optimizer = build(state, mode, tied=False)
    before = chunk.own.detach().clone()
    word = torch.zeros(1)
    other = state.pipeline.ranks[1 - state.pipeline.rank]
    results = []
    for _ in range(2):
        if state.pipeline.rank == 1:  # until the first stage has made its step
            dist.recv(word, other)
        results.append(optimizer.step(0.01))
        optimizer.finish_gather()
        if state.pipeline.rank == 0:
            dist.send(word, other)
        dist.barrier()
    assert not torch.equal(before, chunk.own)
    for result in results:
        assert not result.skipped
    expected = (24 * (1 + 4)) ** 0.5
    assert results[0].grad_norm.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_stages_step_one_after_the_other(world_size: int, mode: dict[str, bool]) -> None:
    run_distributed(world_size, step_one_after_the_other, mode)


def step_with_a_bad_stage(tied: bool, mode: dict[str, bool]) -> None:
    state = ParallelState.create(Topology(4, pipeline=2))
    chunk, optimizer = build(state, mode, tied=tied)
    if state.pipeline.rank == 1:
        chunk.own.main_grad[2, 3] = float("nan")  # type: ignore[index, union-attr]
    before = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    result = optimizer.step(0.01)
    optimizer.finish_gather()
    assert bool(result.skipped) == (tied or state.pipeline.rank == 1)
    for name, parameter in chunk.named_parameters():
        assert torch.equal(parameter, before[name]) == bool(result.skipped)
    assert result.grad_norm.isnan()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [False, True])
def test_who_holds_the_same_tensors_skips_together(tied: bool, mode: dict[str, bool]) -> None:
    run_distributed(4, step_with_a_bad_stage, tied, mode)
