"""A rank that dies or falls silent ends the others, which say what they were waiting for."""

from __future__ import annotations

import multiprocessing
import os
import sys
from datetime import timedelta
from functools import partial
from multiprocessing.queues import Queue

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.topology import Topology
from megatron.pipeline.p2p import PipelineError, TensorSpec
from megatron.pipeline.runtime import PipelineRuntime
from megatron.pipeline.schedule import one_f_one_b
from tests.distributed import distributed

DEAD, MICRO_BATCH = 1, 2


def spec(stage: int) -> TensorSpec:
    return TensorSpec((4,), torch.float32)


class Scale(nn.Module):
    """Multiplies the batch, or the activation of the stage before, by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.input: torch.Tensor | None = None

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        self.input = input_tensor

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return (batch if self.input is None else self.input) * self.factor


def run(state: ParallelState, fail_at: int | None) -> None:
    """One step of 1F1B in which the rank DEAD ends its process at a forward pass."""

    def step(
        chunk: Scale, batch: torch.Tensor, micro_batch: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if state.rank == DEAD and micro_batch == fail_at:
            os._exit(9)
        output = chunk(batch)
        return (output.sum(), {}) if state.rank == state.world_size - 1 else (output, {})

    runtime = PipelineRuntime([Scale()], partial(one_f_one_b, state.world_size), state, step, spec)
    runtime.run([torch.ones(4)] * 6)


def victim(rank: int, world_size: int, port: int, said: Queue[tuple[int, str]]) -> None:
    """A process of its own: the pools' workers must not die."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        run(ParallelState.create(Topology(world_size, pipeline=world_size)), fail_at=MICRO_BATCH)
    except PipelineError as error:
        said.put((rank, str(error)))
        sys.exit(1)


def test_a_rank_that_dies_ends_the_others_with_words() -> None:
    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = context.Queue()
    processes = [
        context.Process(target=victim, args=(rank, 3, store.port, said), daemon=True)
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    # Well under the groups' timeout of minutes: a broken connection is noticed at once.
    words = dict(said.get(timeout=60) for _ in range(2))
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [1, 9, 1]
    assert words[0].startswith("rank 0, stage 0, waits to ")
    assert "to rank 1: " in words[0] or "from rank 1: " in words[0]
    assert words[2].startswith(
        "rank 2, stage 2, waits to receive the activation of micro-batch 2 from rank 1: "
    )


def impatient_state() -> ParallelState:
    dist.barrier()  # the timeout also covers the making of the groups
    return ParallelState.create(Topology(2, pipeline=2), timeout=timedelta(seconds=3))


@distributed(2)
def test_a_rank_that_falls_silent_is_named_after_the_timeout() -> None:
    state = impatient_state()
    # Both ranks make the runtime, one of them does not run it.
    plan = partial(one_f_one_b, 2)
    runtime = PipelineRuntime([Scale()], plan, state, lambda *_: (torch.ones(4), {}), spec)
    if state.rank == 1:
        words = "rank 1, stage 1, waits to receive the activation of micro-batch 0 from rank 0: "
        with pytest.raises(PipelineError, match=words):
            runtime.run([None])
    dist.barrier()


@distributed(2)
def test_a_rank_that_does_not_come_is_named_when_the_pipeline_is_made() -> None:
    state = impatient_state()
    if state.rank == 1:
        plan = partial(one_f_one_b, 2)
        with pytest.raises(PipelineError, match="rank 1 waits to connect to rank 0: "):
            PipelineRuntime([Scale()], plan, state, lambda *_: (torch.ones(4), {}), spec)
    dist.barrier()
