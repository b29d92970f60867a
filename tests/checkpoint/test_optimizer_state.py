"""Training goes on from a checkpoint, whoever held which part of the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint import load_checkpoint, load_global_tensors, save_checkpoint
from megatron.checkpoint.reader import Checkpoint
from megatron.checkpoint.save_load import NamedTensor
from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.shard_spec import ShardSpec
from megatron.mpu.topology import Topology
from megatron.optimizer import Optimizer, build_optimizer
from tests.distributed import run_distributed
from tests.optimizer.support import Net, accumulate_gradients, make_config, micro_batches

MICRO_BATCHES = 4
# World size, tensor size, and how the optimizer's state is spread.
Run = tuple[int, int, dict[str, bool]]
ONE: Run = (1, 1, {})
PLAIN: Run = (4, 2, {})
SCATTERED: Run = (4, 2, {"distributed": True})
WIDE: Run = (4, 1, {"distributed": True})
STREAMED: Run = (2, 1, {"distributed": True, "shard_gradients": True})
SPLIT: Run = (2, 2, {"distributed": True})


class Training:
    """A net and its optimizer on one rank of a run."""

    def __init__(self, run: Run, dtype: torch.dtype) -> None:
        world_size, tensor, mode = run
        self.state = ParallelState.create(Topology(world_size, tensor=tensor))
        # An epsilon above the rounding of the gradients, by which Adam divides.
        self.config = make_config(
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            bucket_size=300,
            adam_eps=1e-4,
            **mode,
        )
        self.net = Net(self.state, dtype)
        self.optimizer: Optimizer = build_optimizer(self.config, [self.net], self.state)

    def steps(self, numbers: range) -> None:
        for number in numbers:
            own = micro_batches(MICRO_BATCHES, number)[self.state.data.rank :: self.state.data.size]
            scale = self.optimizer.loss_scale
            accumulate_gradients(self.optimizer.gradients, self.net, own, MICRO_BATCHES, scale)
            self.optimizer.step(0.01)

    def tensors(self) -> Iterator[NamedTensor]:
        self.optimizer.finish_gather()
        weights = ((p.shard_spec.key, p, p.shard_spec) for p in self.net.parameters())
        return chain(weights, self.optimizer.state_tensors())

    def save(self, path: Path, iteration: int) -> None:
        state = {"optimizer": self.optimizer.state_dict()}
        save_checkpoint(
            path, iteration, self.tensors(), state, config=self.config, state=self.state
        )

    def load(self, path: Path) -> None:
        found = load_checkpoint(path, self.tensors(), config=self.config, state=self.state)
        self.optimizer.load_state_dict(found["optimizer"])


def train_and_save(run: Run, dtype: torch.dtype, path: Path, steps: int, start: int = 0) -> None:
    """Steps from scratch, or on from the checkpoint of step `start`."""
    training = Training(run, dtype)
    if start:
        training.load(path)
    training.steps(range(start, steps))
    training.save(path, steps)


def on(run: Run, function: Any, *arguments: Any) -> None:
    if run[0] == 1:
        function(run, *arguments)
    else:
        run_distributed(run[0], function, run, *arguments)


def stored(path: Path) -> dict[str, Tensor]:
    """Every global tensor of the latest checkpoint but the random states."""
    checkpoint = Checkpoint.open(path)
    keys = [key for key in checkpoint.stored.shapes if not key.startswith("random.")]
    return {key: checkpoint.stored.read(key) for key in keys}


@pytest.mark.parametrize(
    "runs",
    [(SCATTERED, ONE, WIDE), (ONE, STREAMED, SPLIT), (WIDE, PLAIN, SCATTERED), (SPLIT, WIDE, ONE)],
)
def test_any_run_goes_on_from_any_other(tmp_path: Path, runs: tuple[Run, ...]) -> None:
    on(ONE, train_and_save, torch.float64, tmp_path / "whole", 6)
    for index, run in enumerate(runs):
        steps = 2 * (index + 1)
        on(run, train_and_save, torch.float64, tmp_path / "parts", steps, steps - 2)
    expected, found = stored(tmp_path / "whole"), stored(tmp_path / "parts")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        largest = expected[key].abs().max()
        assert ((tensor - expected[key]).abs().max() / largest).item() < 1e-11, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", [PLAIN, SCATTERED, STREAMED])
def test_the_same_layout_goes_on_bitwise(tmp_path: Path, run: Run, dtype: torch.dtype) -> None:
    on(run, train_and_save, dtype, tmp_path / "whole", 4)
    on(run, train_and_save, dtype, tmp_path / "parts", 2)
    on(run, train_and_save, dtype, tmp_path / "parts", 4, 2)
    expected, found = stored(tmp_path / "whole"), stored(tmp_path / "parts")
    assert any(key.startswith("optimizer.master.") for key in expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("run", [PLAIN, SCATTERED])
def test_masters_go_on_in_float32_and_come_from_it(tmp_path: Path, run: Run) -> None:
    on(run, train_and_save, torch.bfloat16, tmp_path, 2)
    half = stored(tmp_path)
    on(ONE, train_and_save, torch.float32, tmp_path, 2, 2)
    full = stored(tmp_path)
    for key in load_keys(tmp_path):
        assert torch.equal(full[key], half[f"optimizer.master.{key}"])
        assert torch.equal(full[f"optimizer.exp_avg.{key}"], half[f"optimizer.exp_avg.{key}"])
    assert not any(key.startswith("optimizer.master.") for key in full)
    on(run, train_and_save, torch.bfloat16, tmp_path, 2, 2)
    again = stored(tmp_path)
    assert all(torch.equal(again[key], half[key]) for key in half)


def load_keys(path: Path) -> list[str]:
    return [key for key, _ in load_global_tensors(path)]


def tied_tensors(path: Path) -> None:
    state = ParallelState.create(Topology(dist.get_world_size(), pipeline=2))
    specs = {0: ShardSpec("words", (6, 5)), 1: ShardSpec("copy", (6, 5), tied_to="words")}
    spec = specs[state.pipeline.rank]
    whole = torch.arange(30.0)
    first, last = ((0, 13), (13, 30))[state.data.rank]
    save_checkpoint(
        path,
        1,
        [("optimizer.mean.words", whole[first:last], spec, first)],
        {},
        config=make_config(),
        state=state,
    )


def test_both_holders_of_a_tied_tensor_offer_the_same_boxes(tmp_path: Path) -> None:
    run_distributed(4, tied_tensors, tmp_path)
    assert torch.equal(stored(tmp_path)["optimizer.mean.words"], torch.arange(30.0).view(6, 5))
