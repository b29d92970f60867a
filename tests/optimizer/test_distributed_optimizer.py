"""State spread over the data-parallel ranks changes nothing but the memory that it takes."""

from __future__ import annotations

import gc
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.mpu.collectives import start_all_gather, start_reduce_scatter
from megatron.mpu.init import normal
from megatron.mpu.parallel_state import Axis, ParallelState
from megatron.mpu.shard_spec import ShardSpec
from megatron.mpu.topology import Topology
from megatron.optimizer import build_optimizer
from tests.distributed import distributed, run_distributed
from tests.optimizer.support import (
    SEED,
    Net,
    accumulate_gradients,
    make_config,
    micro_batches,
    plain_parameter,
)

SINGLE = ParallelState.single()
BUCKET_SIZE = 300
STEPS = 4
MICRO_BATCHES = 4
PLAIN: dict[str, bool] = {}
SCATTERED = {"distributed": True}
STREAMED = {"distributed": True, "shard_gradients": True}


def train(
    state: ParallelState, dtype: torch.dtype, **options: Any
) -> tuple[list[float], list[tuple[ShardSpec, Tensor]], list[float]]:
    """Gradient norms, final weights, and parameter norms of a few steps."""
    net = Net(state, dtype)
    config = make_config(
        bf16=dtype == torch.bfloat16,
        bucket_size=BUCKET_SIZE,
        **{"clip_grad": 0.05, "weight_decay": 0.1, **options},
    )
    optimizer = build_optimizer(config, [net], state)
    norms, parameter_norms = [], []
    for step in range(STEPS):
        own = micro_batches(MICRO_BATCHES, step)[state.data.rank :: state.data.size]
        accumulate_gradients(optimizer.gradients, net, own, MICRO_BATCHES, optimizer.loss_scale)
        norms.append(optimizer.step(0.01).grad_norm.item())
        parameter_norms.append(optimizer.parameter_norm().item())
    optimizer.finish_gather()
    weights = [(p.shard_spec, p.detach()) for p in net.parameters()]
    return norms, weights, parameter_norms


def train_on_a_rank(tensor: int, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    state = ParallelState.create(Topology(dist.get_world_size(), tensor=tensor))
    return state.tensor.rank, train(state, dtype, **options)


@pytest.mark.parametrize("mode", [SCATTERED, STREAMED])
@pytest.mark.parametrize(("world_size", "tensor"), [(2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_one_process(
    world_size: int, tensor: int, dtype: torch.dtype, tolerance: float, mode: dict[str, bool]
) -> None:
    # An epsilon above the rounding of the gradients, by which Adam divides.
    options = {"adam_eps": 1e-4, **mode}
    norms, weights, parameter_norms = train(SINGLE, dtype, adam_eps=1e-4)
    results = run_distributed(world_size, train_on_a_rank, tensor, dtype, options)
    first = results[0][1]
    for tensor_rank, (rank_norms, rank_weights, rank_parameter_norms) in results:
        assert rank_norms == first[0] and rank_parameter_norms == first[2]
        assert rank_norms == pytest.approx(norms, rel=tolerance)
        assert rank_parameter_norms == pytest.approx(parameter_norms, rel=tolerance)
        for (spec, own), (_, expected) in zip(rank_weights, weights, strict=True):
            for box in spec.rectangles(tensor_rank, tensor):
                difference = (own[box.local_slices] - expected[box.global_slices]).abs().max()
                assert (difference / expected.abs().max()).item() < tolerance, spec.name
    for tensor_rank, (_, rank_weights, _) in results:
        replica = results[tensor_rank][1][1]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(rank_weights, replica, strict=True))


@pytest.mark.parametrize("mode", [SCATTERED, STREAMED])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_half_precision_equals_plain_data_parallelism(name: str, mode: dict[str, bool]) -> None:
    common = {"optimizer": name, "loss_scale": 128.0}
    expected = run_distributed(2, train_on_a_rank, 1, torch.bfloat16, common)
    found = run_distributed(2, train_on_a_rank, 1, torch.bfloat16, {**common, **mode})
    tolerance = 1e-2 if mode is STREAMED else 1e-6  # its layers hand over gradients in bfloat16
    for (_, (norms, weights, _)), (_, (truth, true_weights, _)) in zip(
        found, expected, strict=True
    ):
        assert norms == pytest.approx(truth, rel=tolerance)
        for (spec, own), (_, other) in zip(weights, true_weights, strict=True):
            assert torch.allclose(own, other, rtol=tolerance, atol=tolerance), spec.name


def bytes_of_all_tensors() -> int:
    """Memory of every tensor of this process."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def bytes_per_parameter(dtype: torch.dtype, mode: dict[str, bool]) -> float:
    """What a model, its optimizer and its buffers hold between two steps."""
    before = bytes_of_all_tensors()
    state = ParallelState.create(Topology(dist.get_world_size()))
    chunk = nn.Module()
    for index in range(8):  # 2 ** 15 elements each: buckets without padding on 1, 2 and 4 ranks
        name, draw = f"weight{index}", normal(0.2, SEED)
        setattr(chunk, name, plain_parameter(name, (128, 256), state, dtype, draw))
    config = make_config(bf16=dtype == torch.bfloat16, bucket_size=2**16, **mode)
    optimizer = build_optimizer(config, [chunk], state)
    for parameter in chunk.parameters():
        parameter.sum().backward()
    optimizer.gradients.finish()
    optimizer.step(0.01)
    optimizer.finish_gather()
    held = bytes_of_all_tensors() - before
    assert sum(p.numel() for p in chunk.parameters()) == 8 * 2**15
    return held / (8 * 2**15)


@pytest.mark.parametrize("data", [1, 2, 4])
def test_bytes_per_parameter_are_as_published(data: int) -> None:
    published = [
        (torch.bfloat16, PLAIN, 18),
        (torch.bfloat16, SCATTERED, 6 + 12 / data),
        (torch.bfloat16, STREAMED, 2 + 16 / data),
        (torch.float32, PLAIN, 16),
        (torch.float32, SCATTERED, 8 + 8 / data),
        (torch.float32, STREAMED, 4 + 12 / data),
    ]
    for dtype, mode, expected in published:
        for found in run_distributed(data, bytes_per_parameter, dtype, mode):
            # A few scalars come on top: the counts of steps, the loss scale.
            assert expected <= found < expected + 0.005, (dtype, mode)


@distributed(2)
def test_a_step_moves_each_parameter_once_in_each_direction() -> None:
    state = ParallelState.create(Topology(2))
    net = Net(state, torch.bfloat16)
    optimizer = build_optimizer(
        make_config(bf16=True, bucket_size=BUCKET_SIZE, **SCATTERED), [net], state
    )
    moved: dict[str, list[tuple[int, torch.dtype]]] = {"scattered": [], "gathered": []}
    reduced = []
    all_reduce = dist.all_reduce

    def scatter(tensor: Tensor, axis: Axis, out: Tensor) -> Any:
        moved["scattered"].append((tensor.numel(), tensor.dtype))
        return start_reduce_scatter(tensor, axis, out)

    def gather(tensor: Tensor, axis: Axis, out: Tensor) -> Any:
        moved["gathered"].append((out.numel(), out.dtype))
        return start_all_gather(tensor, axis, out)

    def spy(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        reduced.append(tensor.numel())
        return all_reduce(tensor, *arguments, **options)

    with (
        mock.patch("megatron.optimizer.reduction.start_reduce_scatter", scatter),
        mock.patch("megatron.optimizer.gather.start_all_gather", gather),
        mock.patch("torch.distributed.all_reduce", spy),
    ):
        accumulate_gradients(optimizer.gradients, net, micro_batches(3, 0), 3)
        optimizer.step(0.01)
        optimizer.finish_gather()
    sizes = [bucket.size for bucket in optimizer.gradients.buckets]
    assert len(sizes) > 2
    assert moved["scattered"] == [(size, torch.float32) for size in sizes]
    assert moved["gathered"] == [(size, torch.bfloat16) for size in reversed(sizes)]
    assert reduced == [1]  # the norm, over all ranks


@distributed(4)
def test_shards_lie_side_by_side_and_cover_every_bucket() -> None:
    state = ParallelState.create(Topology(4))
    net = Net(state)
    optimizer = build_optimizer(make_config(bucket_size=BUCKET_SIZE, **SCATTERED), [net], state)
    counts = dict.fromkeys(net.parameters(), 0)
    for shard in optimizer.gradients.shards:
        for parameter, part, first in shard.parts(shard.values):
            counts[parameter] += part.numel()
            assert torch.equal(part, parameter.detach().flatten()[first : first + part.numel()])
    totals = torch.tensor(list(counts.values()))
    dist.all_reduce(totals)
    assert totals.tolist() == [parameter.numel() for parameter in counts]


@pytest.mark.parametrize("mode", [SCATTERED, STREAMED])
def test_a_bad_gradient_on_one_rank_stops_all(mode: dict[str, bool]) -> None:
    run_distributed(4, step_with_a_bad_gradient, mode)


def step_with_a_bad_gradient(mode: dict[str, bool]) -> None:
    state = ParallelState.create(Topology(4, tensor=2))
    net = Net(state)
    config = make_config(bucket_size=BUCKET_SIZE, **mode)
    optimizer = build_optimizer(config, [net], state)
    before = [p.detach().clone() for p in net.parameters()]
    shards = optimizer.gradients.shards
    split = next(shard for shard in shards if shard.buffer.traits.split)
    for bad_rank in range(4):
        for shard in shards:
            shard.gradients.fill_(1.0)
        if state.rank == bad_rank:
            split.gradients[-1] = float("inf")
        result = optimizer.step(0.01)
        optimizer.finish_gather()
        assert result.skipped
        assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


class Stage(nn.Module):
    """A stage that shares words with the other end, a table with all, and has its own layer."""

    def __init__(self, state: ParallelState) -> None:
        super().__init__()
        rank, last = state.pipeline.rank, state.pipeline.size - 1
        for name, shape, holders in (("words", (30, 7), (0, last)), ("table", (5, 3), None)):
            if holders is None or rank in holders:
                weight = plain_parameter(name, shape, state, torch.float64, normal(0.2, SEED))
                if rank > 0:
                    weight.shard_spec = ShardSpec(f"copy{rank}.{name}", shape, tied_to=name)
                setattr(self, name, weight)
        own = (3 + rank, 11)
        self.own = plain_parameter(f"own{rank}", own, state, torch.float64, normal(0.2, SEED))
        self.norm = plain_parameter(f"norm{rank}", (5,), state, torch.float64, normal(0.2, SEED))
        self.norm.shard_spec = ShardSpec(f"norm{rank}", (5,), partial=True)


def gradient_of(parameter: nn.Parameter, step: int, state: ParallelState) -> Tensor:
    """Different on all ranks; on those of one tensor axis only where it is partial."""
    rank = state.rank if parameter.shard_spec.partial else state.rank // state.tensor.size
    generator = torch.Generator().manual_seed(step * 1000 + rank * 100 + parameter.numel())
    return torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def train_stages(
    topology: Topology, mode: dict[str, bool]
) -> tuple[list[float], dict[str, Tensor]]:
    state = ParallelState.create(topology)
    stage = Stage(state)
    config = make_config(bucket_size=20, clip_grad=0.5, weight_decay=0.1, **mode)
    optimizer = build_optimizer(config, [stage], state)
    norms = []
    for step in range(STEPS):
        optimizer.gradients.zero()
        for parameter in stage.parameters():
            parameter.main_grad.copy_(gradient_of(parameter, step, state))
        optimizer.gradients.finish()
        norms.append(optimizer.step(0.01).grad_norm.item())
        optimizer.finish_gather()
    weights = {name: p.detach().clone() for name, p in stage.named_parameters()}
    return norms, weights


@pytest.mark.parametrize(
    "topology",
    [
        Topology(4, pipeline=2),
        Topology(3, pipeline=3),
        Topology(6, pipeline=3),
        Topology(4, tensor=2),
    ],
)
def test_tied_and_partial_gradients_as_without(topology: Topology) -> None:
    expected = run_distributed(topology.world_size, train_stages, topology, PLAIN)
    found = run_distributed(topology.world_size, train_stages, topology, SCATTERED)
    for (norms, weights), (truth, true_weights) in zip(found, expected, strict=True):
        assert norms == pytest.approx(truth, rel=1e-12)
        for name, weight in weights.items():
            assert torch.allclose(weight, true_weights[name], rtol=1e-12, atol=1e-13), name
    for name in ("words", "table"):
        for results in (expected, found):
            copies = [weights[name] for _, weights in results if name in weights]
            assert len(copies) > 1 and all(torch.equal(copy, copies[0]) for copy in copies)


@distributed(2)
def test_copies_in_two_chunks_of_a_rank_are_one_tensor() -> None:
    state = ParallelState.create(Topology(2))
    chunks = [nn.Module(), nn.Module()]
    for index, chunk in enumerate(chunks):
        table = plain_parameter("table", (5, 3), state, torch.float64, normal(0.2, SEED))
        if index == 0:  # a copy is found before its owner
            table.shard_spec = ShardSpec("copy", (5, 3), tied_to="table")
        chunk.table = table
    optimizer = build_optimizer(make_config(**SCATTERED), chunks, state)
    optimizer.gradients.zero()
    for index, chunk in enumerate(chunks):
        optimizer.gradients.on_last_backward(index)
        (chunk.table * (state.rank + 1)).sum().backward()
    optimizer.gradients.finish()
    (shard,) = optimizer.gradients.shards
    assert shard.gradients[0] == (6 if state.rank == 0 else 0)
    optimizer.step(0.01)
    optimizer.finish_gather()
    assert torch.equal(chunks[0].table, chunks[1].table)
    assert optimizer.parameter_count() == 15
    keys = [key for key, *_ in optimizer.state_tensors()]
    assert sorted(keys) == ["optimizer.exp_avg.table", "optimizer.exp_avg_sq.table"]
