"""Weight gradients that are computed after the backward pass reach the buffers in time."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron.mpu.deferral import defer_weight_gradients
from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.topology import Topology
from megatron.optimizer import build_optimizer
from tests.distributed import run_distributed
from tests.optimizer.support import Net, accumulate_gradients, loss_of, make_config, micro_batches


def train_deferred(dtype: torch.dtype, scattered: bool) -> None:
    state = ParallelState.create(Topology(dist.get_world_size()))
    half = dtype == torch.bfloat16
    config = make_config(bf16=half, bucket_size=100, distributed=scattered, clip_grad=0.1)
    nets = [Net(state, dtype), Net(state, dtype)]
    optimizers = [build_optimizer(config, [net], state) for net in nets]
    for step in range(3):
        own = micro_batches(3, 10 * step + state.rank)
        accumulate_gradients(optimizers[0].gradients, nets[0], own, 3)
        gradients = optimizers[1].gradients
        gradients.zero()
        left = []
        for index, tokens in enumerate(own):
            if index == 2:
                gradients.on_last_backward(0)
            with defer_weight_gradients() as deferred:
                loss_of(nets[1], tokens, 3).backward()
            left.append(deferred)
            if index == 1:  # some catch up in between
                left.pop(0).compute()
        assert nets[1].wide.weight.outstanding == 2
        while left:
            left.pop(0).compute()
        gradients.finish()
        norms = [optimizer.step(0.01).grad_norm.item() for optimizer in optimizers]
        assert norms[0] == pytest.approx(norms[1], rel=1e-12 if dtype == torch.float64 else 1e-2)
    for optimizer in optimizers:
        optimizer.finish_gather()
    for own_weight, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        tolerance = 1e-2 if half else 1e-12
        assert torch.allclose(own_weight, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 2])
def test_deferring_changes_nothing(world_size: int, dtype: torch.dtype, scattered: bool) -> None:
    run_distributed(world_size, train_deferred, dtype, scattered)
