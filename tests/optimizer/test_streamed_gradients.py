"""Gradients that pass through short-lived buckets, of which only a shard's sums are kept."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.mpu.init import normal
from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.topology import Topology
from megatron.optimizer import GradientBuffers
from megatron.optimizer.reduction import StreamedGradients
from tests.distributed import distributed, run_distributed
from tests.optimizer.support import SEED, Net, loss_of, micro_batches, plain_parameter


def shard_of(gradients: GradientBuffers, wanted: nn.Parameter) -> tuple[Tensor, int]:
    """What this rank holds of a parameter's gradient, and the index of its first element."""
    for shard in gradients.shards:
        for parameter, part, first in shard.parts(shard.gradients):
            if parameter is wanted:
                return part, first
    raise AssertionError("every rank knows every parameter of its stage")


def check_against_autograd(
    net: nn.Module, gradients: GradientBuffers, losses: list[Tensor]
) -> None:
    """The shards hold the sum over all ranks of the gradients of this rank's losses."""
    parameters = list(net.parameters())
    plain = torch.autograd.grad(sum(losses), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, plain, strict=True):
        total = torch.zeros_like(parameter) if gradient is None else gradient.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
        part, first = shard_of(gradients, parameter)
        expected = total.flatten()[first : first + part.numel()]
        assert torch.allclose(part, expected, rtol=1e-12, atol=1e-14)


def accumulate(micro_batch_count: int) -> None:
    size = dist.get_world_size()
    state = ParallelState.create(Topology(size))
    net = Net(state, torch.float64)
    gradients = GradientBuffers([net], state, bucket_size=100, streamed=True)
    for step in range(2):
        gradients.zero()
        own = micro_batches(micro_batch_count, 10 * step + state.rank)
        for index, tokens in enumerate(own):
            if index == len(own) - 1:
                gradients.on_last_backward(0)
            loss_of(net, tokens, 4).backward()
            assert all(parameter.grad is None for parameter in net.parameters())
        gradients.finish()
        check_against_autograd(net, gradients, [loss_of(net, tokens, 4) for tokens in own])
    if size > 1:
        state.destroy()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_count", [1, 3])
def test_any_number_of_micro_batches_adds_up(world_size: int, micro_batch_count: int) -> None:
    run_distributed(world_size, accumulate, micro_batch_count)


class Deep(nn.Module):
    """Equal square layers, some of which a forward pass may leave out."""

    def __init__(self, state: ParallelState, depth: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(
            plain_parameter(f"layer{i}", (32, 64), state, torch.float64, normal(0.1, SEED))
            for i in range(depth)
        )

    def forward(self, x: Tensor, left_out: frozenset[int] = frozenset()) -> Tensor:
        for index, weight in enumerate(self.layers):
            if index not in left_out:
                x = torch.tanh(x @ weight) @ weight.t()
        return x.square().sum()


@distributed(2)
def test_never_more_than_two_buckets_are_held() -> None:
    state = ParallelState.create(Topology(2))
    net = Deep(state, 12)
    gradients = GradientBuffers([net], state, bucket_size=2048, streamed=True)
    streamed = gradients._reduction
    assert isinstance(streamed, StreamedGradients)
    assert len(gradients.buckets) == 12
    x = torch.ones(4, 32, dtype=torch.float64)
    gradients.zero()
    for _ in range(3):
        net(x * (state.rank + 1)).backward()
    gradients.finish()
    assert streamed.peak == 2 * max(bucket.size for bucket in gradients.buckets)
    check_against_autograd(net, gradients, [3 * net(x * (state.rank + 1))])
    state.destroy()


@distributed(2)
def test_parameters_that_take_no_part_hold_nothing_up_for_good() -> None:
    state = ParallelState.create(Topology(2))
    net = Deep(state, 4)
    gradients = GradientBuffers([net], state, bucket_size=2048, streamed=True)
    x = torch.ones(4, 32, dtype=torch.float64)
    # Layer 3 is used by nobody, layer 1 by one rank in one micro-batch.
    left_out = [{3}, {3} if state.rank == 0 else {1, 3}, {1, 3}]
    gradients.zero()
    for out in left_out:
        net(x, frozenset(out)).backward()
    gradients.finish()
    check_against_autograd(net, gradients, [net(x, frozenset(out)) for out in left_out])
    state.destroy()
