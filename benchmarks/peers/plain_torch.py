"""The GPT in plain PyTorch, on several processes with PyTorch's own tools.

Tensor parallelism by `parallelize_module`, pipelines by `torch.distributed.pipelining`, data
parallelism by DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.plain_gpt import PlainGPT, mean_loss
from benchmarks.peers.sizes import Sizes
from benchmarks.peers.updates import Update


def build(sizes: Sizes, layout: str) -> Callable[[], float]:
    """A step of the layout; every process of it must build one."""
    if layout == "pp":
        return _pipeline(sizes)
    model: nn.Module = PlainGPT(sizes, range(sizes.layers))
    split = layout in ("tp", "tp-sp")
    if split:
        _split(model, sequence=layout == "tp-sp")
    parts, part = 1, 0
    if layout == "dp":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        parts, part = dist.get_world_size(), dist.get_rank()
    update = Update(model.parameters())
    batches = cycle(sizes.batches())

    def step() -> float:
        tokens = next(batches).chunk(parts)[part]
        with loss_parallel() if split else nullcontext():
            loss = mean_loss(model(tokens[:, :-1]), tokens[:, 1:])
            loss.backward()
        update()
        total = loss.detach()
        if parts > 1:
            dist.all_reduce(total)
        return total.item() / parts

    return step


def _split(model: nn.Module, *, sequence: bool) -> None:
    """Split the layers over the world, and between them the sequence where it says so."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    along = Shard(1) if sequence else Replicate()
    plan: dict[str, ParallelStyle] = {
        "embedding.words": RowwiseParallel(input_layouts=Replicate(), output_layouts=along),
        "blocks.*.qkv": ColwiseParallel(input_layouts=along),
        "blocks.*.projection": RowwiseParallel(output_layouts=along),
        "blocks.*.up": ColwiseParallel(input_layouts=along),
        "blocks.*.down": RowwiseParallel(output_layouts=along),
        "head": ColwiseParallel(
            input_layouts=along, output_layouts=Shard(-1), use_local_output=False
        ),
    }
    if sequence:
        norms = ("blocks.*.norm_1", "blocks.*.norm_2", "norm")
        plan |= {name: SequenceParallel(use_local_output=True) for name in norms}
        plan["embedding.positions"] = RowwiseParallel(
            input_layouts=Replicate(),
            output_layouts=Shard(0),  # it makes [s, h]
        )
    assert isinstance(model, PlainGPT)
    parallelize_module(model, mesh, plan)
    model.tie()


def _pipeline(sizes: Sizes) -> Callable[[], float]:
    """1F1B over two stages; the two copies of the word embedding add up their gradients."""
    rank = dist.get_rank()
    first = sizes.stage_layers[0]
    numbers = range(first) if rank == 0 else range(first, sizes.layers)
    model = PlainGPT(sizes, numbers, begins=rank == 0, ends=rank == 1)
    stage = PipelineStage(model, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, sizes.micro_batches, loss_fn=mean_loss)
    module = model.embedding.words if model.embedding is not None else model.head
    assert isinstance(module, nn.Embedding | nn.Linear)
    words = module.weight
    update = Update(
        model.parameters(),
        group=dist.group.WORLD,
        counted=lambda parameter: rank == 0 or parameter is not words,
    )
    batches = cycle(sizes.batches())

    def step() -> float:
        tokens = next(batches)
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(tokens[:, :-1])
        else:
            schedule.step(target=tokens[:, 1:], losses=losses)
        assert words.grad is not None
        dist.all_reduce(words.grad)
        update()
        return torch.stack(losses).mean().item() if losses else float("nan")

    return step
