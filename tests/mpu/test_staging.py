"""Over gloo an accelerator's tensors pass through the host, and what comes back is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.mpu import ParallelState, collectives
from megatron.mpu.collectives import MAX
from megatron.mpu.topology import Topology
from megatron.training.batches import training_batches
from megatron.training.gpt import GPTPretraining
from megatron.training.initialize import rank_grid
from megatron.training.trainer import Trainer
from tests.distributed import distributed
from tests.mpu.accelerator import all_tensors_on_an_accelerator
from tests.training.tiny import Samples, random_samples, tiny_config


def _collectives(state: ParallelState) -> list[Tensor]:
    axis, rank = state.data, float(state.rank)
    tensor = torch.arange(12.0).view(6, 2) + 100 * rank
    turned = tensor.t().contiguous().t()
    gathered = torch.zeros(18, 2)
    return [
        collectives.all_reduce(tensor.clone(), axis),
        collectives.all_reduce(turned.clone(), axis, MAX),
        collectives.start_all_reduce(turned.clone(), axis).wait(),
        collectives.broadcast(turned.clone(), axis, source=1),
        collectives.all_gather(turned, axis),
        collectives.start_all_gather(tensor, axis, gathered).wait(),
        gathered,
        collectives.reduce_scatter(turned, axis),
        collectives.reduce_scatter(tensor.bfloat16(), axis),
    ]


@distributed(3)
def test_collectives_are_the_same() -> None:
    state = ParallelState.create(Topology(3))
    expected = _collectives(state)
    with all_tensors_on_an_accelerator() as used:
        found = _collectives(state)
    assert used == {"all_reduce", "broadcast", "isend", "irecv"}
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def _losses(parallel: dict[str, Any]) -> list[list[float]]:
    model = {"model_type": "gpt", "num_layers": 4}
    run = {"micro_batch_size": 1}
    config = tiny_config(model=model, parallel=parallel, train=run)
    trainer = Trainer(config, GPTPretraining(config), ParallelState.create(rank_grid(config, 4)))
    dataset = Samples(random_samples(16, seed=3, model_type="gpt"))
    history = [
        [*trainer.over_ranks(step.parts).tolist(), step.grad_norm.item()]
        for step in trainer.steps(training_batches(trainer, dataset))
    ]
    trainer.finish()
    return history


@pytest.mark.parametrize(
    "parallel",
    [
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"use_distributed_optimizer": True, "shard_gradients": True},
    ],
    ids=["pipeline", "tensor", "data"],
)
@distributed(4)
def test_training_is_the_same(parallel: dict[str, Any]) -> None:
    expected = _losses(parallel)
    with all_tensors_on_an_accelerator() as used:
        assert _losses(parallel) == expected
    assert used
