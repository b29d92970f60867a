"""A run whose micro-batches are recorded and replayed is bitwise the run that goes through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.mpu import ParallelState
from megatron.ops import kernels
from megatron.training.batches import evaluation_batches, training_batches
from megatron.training.graphs import (
    MOST_GRAPHS,
    WARM_UPS,
    MicroBatchGraphs,
    Recording,
)
from megatron.training.initialize import rank_grid
from megatron.training.task import Batch, Parts
from megatron.training.trainer import Trainer
from tests.distributed import distributed
from tests.training.device_rules import OperatorGraphs, WouldWaitError, no_waiting
from tests.training.tiny import TASKS, Samples, micro_batches, random_samples, tiny_config

STEPS, GLOBAL_BATCH = 4, 4
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
History = list[list[float]]


def _samples(kind: str, count: int, seed: int) -> list[Batch]:
    samples = random_samples(count, seed=seed, model_type=kind)
    for sample in samples:
        sample.pop("document_lengths", None)
    return samples


def _train(record: bool, ranks: int = 1, **sections: Any) -> tuple[History, list[Tensor], Any]:
    """Losses, norms and evaluations of a run, its weights at the end, and what recorded."""
    run = {"micro_batch_size": 1, "global_batch_size": GLOBAL_BATCH, "train_iters": STEPS}
    optimizer = sections.pop("optimizer", {})
    config = tiny_config(**sections, train=run | {"cuda_graphs": record})
    config = replace(config, optimizer=replace(config.optimizer, **optimizer))
    state = ParallelState.single() if ranks == 1 else ParallelState.create(rank_grid(config, ranks))
    kind = config.model.model_type
    graphs = OperatorGraphs(
        lambda: [
            b.gradients for b in trainer.optimizer.gradients.buffers if b.gradients is not None
        ]
    )
    trainer = Trainer(config, TASKS[kind](config), state, record=graphs)
    train, held_out = (Samples(_samples(kind, n, seed=n)) for n in (STEPS * GLOBAL_BATCH, 8))
    history = []
    for step in trainer.steps(training_batches(trainer, train)):
        scale = trainer.optimizer.loss_scale.item()
        history.append([*step.parts.tolist(), step.grad_norm.item(), scale])
        if step.iteration == STEPS - 1:
            means = trainer.evaluate(evaluation_batches(trainer, held_out))
            history.append(list(means.values()))
    trainer.finish()
    return history, [weight.clone() for _, weight, _ in trainer.weights], graphs


def _assert_same_runs(ranks: int, **sections: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("bert_model", "t5_model"):
            # Recorded or not, as on a GPU: it is not looked whether there is any padding.
            path = f"megatron.model.{module}.padding_mask"
            patch.setattr(path, lambda real: real[:, None, None, :])
        plain, weights, none = _train(False, ranks, **sections)
        found, found_weights, graphs = _train(True, ranks, **sections)
    assert found == plain
    assert all(map(torch.equal, found_weights, weights))
    assert (none.count, graphs.count) == (0, 1)
    assert graphs.replays == STEPS * GLOBAL_BATCH // ranks - WARM_UPS


@pytest.mark.parametrize("kind", ["bert", "gpt", "t5"])
@pytest.mark.parametrize("half", [{"fp64": True}, {"fp64": False, "bf16": True}], ids=str)
def test_graphs_change_nothing(kind: str, half: dict[str, bool]) -> None:
    _assert_same_runs(1, model={"model_type": kind, **half, **DROPOUT})


def test_a_loss_scale_that_moves_is_found_in_its_place() -> None:
    model = {"model_type": "gpt", "fp64": False, "fp16": True, **DROPOUT}
    doubling = {"initial_loss_scale": 2.0, "loss_scale_window": 1}
    _assert_same_runs(1, model=model, optimizer=doubling)


def test_kernels_are_recorded_like_any_operator() -> None:
    model = {"model_type": "gpt", "num_layers": 1, "fp64": False, "bf16": True, **DROPOUT}
    with kernels.using("emulated"):
        _assert_same_runs(1, model=model)


@pytest.mark.parametrize("parallel", [{}, {"use_distributed_optimizer": True}], ids=str)
@distributed(2)
def test_data_parallel_ranks_sum_behind_the_graphs(parallel: dict[str, Any]) -> None:
    model = {"model_type": "gpt", "fp64": False, "bf16": True, **DROPOUT}
    _assert_same_runs(2, model=model, parallel=parallel)


class _Steps:
    """Work that says what was asked for, and a recorder that replays it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.total = torch.zeros(())
        self.seed = 0

    def start(self, micro_batch: int) -> None:
        self.seed = 10 * micro_batch

    def work(self, batch: Batch) -> Parts:
        self.total += batch["x"].sum() + self.seed
        return {"loss": batch["x"].sum() + self.seed}

    def record(self, work: Any) -> Recording:
        self.said.append("recorded")
        parts = {"loss": torch.tensor(float("nan"))}

        def replay() -> None:
            parts["loss"].copy_(work()["loss"])

        return Recording(parts, replay)


def test_each_set_of_shapes_is_warmed_up_and_recorded_once() -> None:
    steps = _Steps()
    graphs = MicroBatchGraphs(steps.work, steps.start, steps.record)
    expected, losses = 0, []
    for number in range(WARM_UPS + 3):
        for size in range(1, MOST_GRAPHS + 3):
            batch = {"x": torch.full((size,), number)}
            losses.append((graphs(batch, number)["loss"], size * number + 10 * number))
            expected += size * number + 10 * number
    assert all(found == wanted for found, wanted in losses), "a later replay wrote over it"
    assert steps.total == expected
    assert steps.said == ["recorded"] * MOST_GRAPHS


@pytest.mark.parametrize("kind", ["bert", "gpt", "t5"])
def test_nobody_waits_in_a_step(kind: str) -> None:
    config = tiny_config(model={"model_type": kind, **DROPOUT})
    trainer = Trainer(config, TASKS[kind](config), ParallelState.single())
    parts = torch.zeros(len(trainer.task.loss_parts), dtype=torch.float64)
    batches = [micro_batches(_samples(kind, GLOBAL_BATCH, seed), 2) for seed in range(2)]
    with no_waiting():
        for step in map(trainer.step, batches):
            parts += torch.where(step.skipped, 0, step.parts)
    assert parts.isfinite().all()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0]),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.index_put_((x > 1,), x[:1]),
    ],
)
def test_who_waits_is_found(wait: Callable[[Tensor], object]) -> None:
    x = torch.arange(3)
    with pytest.raises(WouldWaitError), no_waiting():
        wait(x)
