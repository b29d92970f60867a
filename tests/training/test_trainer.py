"""A step is a function of the global batch, not of how it is cut up or spread over ranks."""

import pytest
import torch

from megatron.mpu import ParallelState, Topology
from megatron.training.bert import BertPretraining
from megatron.training.trainer import Trainer
from tests.distributed import distributed
from tests.training.tiny import micro_batches, random_samples, tiny_config

GLOBAL_BATCH, STEPS = 4, 4


def _train(
    state: ParallelState, micro_batch_size: int, **sections: dict[str, object]
) -> tuple[list[list[float]], Trainer]:
    """Loss parts and gradient norm of each step, and the trainer after the last."""
    train = {"micro_batch_size": micro_batch_size, "global_batch_size": GLOBAL_BATCH}
    trainer = Trainer(
        config := tiny_config(train=train, **sections), BertPretraining(config), state
    )
    samples = random_samples(GLOBAL_BATCH * STEPS, seed=3)
    batches = micro_batches(samples, micro_batch_size)
    # Data-parallel ranks take turns, micro-batch by micro-batch.
    mine = batches[state.data.rank :: state.data.size]
    history = []
    for step in trainer.steps(iter(mine)):
        history.append([*trainer.over_ranks(step.parts).tolist(), step.grad_norm.item()])
    return history, trainer


def _assert_same_run(
    found: tuple[list[list[float]], Trainer], expected: tuple[list[list[float]], Trainer]
) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=0)
    norms = [trainer.optimizer.parameter_norm() for _, trainer in (found, expected)]
    torch.testing.assert_close(*norms, rtol=1e-11, atol=0)
    held_out = micro_batches(random_samples(8, seed=9), found[1].config.train.micro_batch_size)
    mine = held_out[found[1].state.data.rank :: found[1].state.data.size]
    reference = micro_batches(random_samples(8, seed=9), expected[1].config.train.micro_batch_size)
    losses = found[1].evaluate(mine), expected[1].evaluate(reference)
    assert losses[0] == pytest.approx(losses[1], rel=1e-11)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_micro_batches_change_nothing(micro_batch_size: int) -> None:
    alone = ParallelState.single()
    _assert_same_run(_train(alone, micro_batch_size), _train(alone, 2))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@distributed(4)
def test_ranks_change_nothing(tensor: int, pipeline: int) -> None:
    parallel = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    state = ParallelState.create(Topology(4, tensor, pipeline))
    expected = _train(ParallelState.single(), 2)
    _assert_same_run(_train(state, 1, parallel=parallel), expected)


def test_dropout_is_drawn_anew_by_step_and_alike_by_run() -> None:
    model = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
    alone = ParallelState.single()
    first, second = (_train(alone, 2, model=model)[0] for _ in range(2))
    assert first == second
    trainer = _train(alone, 2, model=model)[1]
    batches = micro_batches(random_samples(GLOBAL_BATCH, seed=5), 2)
    trainer.learning_rates = type(trainer.learning_rates)(0.0, 0.0, "constant", 0, 1)
    assert not torch.equal(trainer.step(batches).parts, trainer.step(batches).parts)


def test_an_evaluation_is_the_mean_over_all_tokens_and_changes_nothing() -> None:
    trainer = _train(ParallelState.single(), 2, model={"hidden_dropout": 0.3})[1]
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
    history, trainer = _train(ParallelState.single(), 2, model={"bert_no_binary_head": True})
    assert [len(row) for row in history] == [2] * STEPS
    assert list(trainer.evaluate(micro_batches(random_samples(4, seed=1), 2))) == ["lm_loss"]
