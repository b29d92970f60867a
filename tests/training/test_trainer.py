"""A step is a function of the global batch, not of how it is cut up or spread over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.mpu import ParallelState
from megatron.training.batches import evaluation_batches, training_batches
from megatron.training.initialize import rank_grid
from megatron.training.trainer import Trainer
from tests.distributed import distributed, run_distributed
from tests.training.tiny import TASKS, Samples, micro_batches, random_samples, tiny_config

GLOBAL_BATCH, STEPS, HELD_OUT = 4, 4, 24
Run = tuple[list[list[float]], dict[str, float], Trainer]


def _train(ranks: int = 1, micro_batch_size: int = 2, **sections: dict[str, Any]) -> Run:
    """Loss parts, gradient norm and batch size of each step, an evaluation, and the trainer."""
    train = {
        "micro_batch_size": micro_batch_size,
        "global_batch_size": GLOBAL_BATCH,
        "train_samples": GLOBAL_BATCH * STEPS,
        "train_iters": None,
    }
    config = tiny_config(**sections | {"train": train | sections.get("train", {})})
    state = ParallelState.single() if ranks == 1 else ParallelState.create(rank_grid(config, ranks))
    kind = config.model.model_type
    trainer = Trainer(config, TASKS[kind](config), state)
    assert config.train.train_samples is not None
    dataset = Samples(random_samples(config.train.train_samples, seed=3, model_type=kind))
    history = [
        [*trainer.over_ranks(step.parts).tolist(), step.grad_norm.item(), step.batch_size]
        for step in trainer.steps(training_batches(trainer, dataset))
    ]
    held_out = Samples(random_samples(HELD_OUT, seed=9, model_type=kind))
    means = trainer.evaluate(evaluation_batches(trainer, held_out))
    trainer.finish()
    return history, means, trainer


def _assert_same_run(found: Run, expected: Run) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=0)
    assert found[1] == pytest.approx(expected[1], rel=1e-11)
    norms = [trainer.optimizer.parameter_norm() for _, _, trainer in (found, expected)]
    torch.testing.assert_close(*norms, rtol=1e-11, atol=0)


def test_dropout_is_drawn_anew_by_step_and_alike_by_run() -> None:
    dropout = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
    first, second = (_train(model=dropout) for _ in range(2))
    assert first[0] == second[0]
    trainer = first[2]
    batches = micro_batches(random_samples(GLOBAL_BATCH, seed=5), 2)
    trainer.learning_rates = type(trainer.learning_rates)(0.0, 0.0, "constant", 0, 1)
    assert not torch.equal(trainer.step(batches).parts, trainer.step(batches).parts)


def test_an_evaluation_is_the_mean_over_all_tokens_and_changes_nothing() -> None:
    trainer = _train(model={"hidden_dropout": 0.3})[2]
    samples = random_samples(12, seed=12)
    whole = trainer.evaluate(micro_batches(samples, 2))
    thirds = [samples[i : i + 4] for i in (0, 4, 8)]
    means = [trainer.evaluate(micro_batches(third, 2)) for third in thirds]
    masked = [sum(one["masked_weights"].sum().item() for one in third) for third in thirds]
    assert len(set(masked)) > 1, "the mean of means must differ"
    lm = sum(mean["lm_loss"] * count for mean, count in zip(means, masked, strict=True))
    expected = {"lm_loss": lm / sum(masked), "nsp_loss": sum(m["nsp_loss"] for m in means) / 3}
    assert whole == pytest.approx(expected, rel=1e-12)


def test_without_the_binary_head_there_is_one_part() -> None:
    history, means, _ = _train(model={"bert_no_binary_head": True})
    assert [len(row) for row in history] == [3] * STEPS
    assert list(means) == ["lm_loss"]


def _short(settings: dict[str, Any]) -> str:
    """The settings without their long names."""
    parts = (
        f"{''.join(w[0] for w in name.split('_'))}={value}" for name, value in settings.items()
    )
    return ",".join(parts) or "bert"


def _layout(tensor: int = 1, pipeline: int = 1, **others: Any) -> dict[str, Any]:
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    return sizes | others


SPLIT_SEQUENCE = _layout(2, sequence_parallel=True)
VIRTUAL = _layout(1, 2, num_layers_per_virtual_pipeline_stage=1)
GPT = {"model_type": "gpt", "num_layers": 4}
T5 = {"model_type": "t5", "decoder_num_layers": 4}
RAMP = {"rampup_batch_size": (4, 4, 10), "global_batch_size": 12, "train_samples": 30}


@pytest.mark.parametrize("model", [{}, GPT, T5], ids=["bert", "gpt", "t5"])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_micro_batches_change_nothing(micro_batch_size: int, model: dict[str, Any]) -> None:
    _assert_same_run(_train(1, micro_batch_size, model=model), _train(1, 2, model=model))


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ({}, _layout(1, 1)),
        ({}, _layout(2, 1)),
        ({}, _layout(1, 2)),
        ({}, _layout(2, 2)),
        ({"num_layers": 4}, VIRTUAL),
        (GPT, SPLIT_SEQUENCE),
        (GPT, VIRTUAL),
        (GPT, _layout(1, 4, pipeline_schedule="zb-h1")),
        (GPT, _layout(1, 2, use_distributed_optimizer=True)),
        (T5, SPLIT_SEQUENCE),
        (T5, _layout(2, 2, sequence_parallel=True)),
        (T5, _layout(1, 4, pipeline_model_parallel_split_rank=2)),
        (T5, _layout(1, 2, use_distributed_optimizer=True)),
    ],
    ids=_short,
)
@distributed(4)
def test_ranks_change_nothing(model: dict[str, Any], parallel: dict[str, Any]) -> None:
    _assert_same_run(_train(4, 1, model=model, parallel=parallel), _train(model=model))


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ({}, _layout(2, 2)),
        (GPT, VIRTUAL),
        (T5, _layout(1, 4, pipeline_model_parallel_split_rank=2)),
    ],
    ids=["bert", "gpt", "t5"],
)
@distributed(4)
def test_a_growing_batch_changes_nothing_either(
    model: dict[str, Any], parallel: dict[str, Any]
) -> None:
    found = _train(4, 1, model=model, parallel=parallel, train=RAMP)
    assert [row[-1] for row in found[0]] == [4, 4, 8, 12]
    _assert_same_run(found, _train(model=model, train=RAMP))


def _history(parallel: dict[str, Any]) -> list[list[float]]:
    """Of eight steps of GPT on two ranks."""
    return _train(2, 1, model=GPT, parallel=parallel, train={"train_samples": 32})[0]


def test_a_plan_by_measured_times_changes_no_bit() -> None:
    """The costs are measured in the first four steps and then planned by, unlike stated ones."""
    zero_bubble = _layout(1, 2, pipeline_schedule="zb-2p")
    measured = run_distributed(2, _history, zero_bubble)
    stated = run_distributed(2, _history, zero_bubble | {"pipeline_costs": (1.0, 2.0, 0.5, 0.1)})
    assert measured == stated
    assert len(measured[0]) == 8
