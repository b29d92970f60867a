"""Over gloo an accelerator's tensors pass through the host, and what comes back is the same.

There is no accelerator here. Every tensor is said to be one's, what was copied to the host is told
by its memory, and gloo is watched: it may be given nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mpu import ParallelState, collectives, direct, staging
from megatron.mpu.collectives import MAX
from megatron.mpu.topology import Topology
from megatron.pipeline import p2p
from megatron.training.batches import training_batches
from megatron.training.gpt import GPTPretraining
from megatron.training.initialize import rank_grid
from megatron.training.trainer import Trainer
from tests.distributed import distributed
from tests.training.tiny import Samples, random_samples, tiny_config

_EXCHANGES = ("all_reduce", "broadcast", "send", "recv", "isend", "irecv")


@contextmanager
def _all_tensors_on_an_accelerator() -> Iterator[set[str]]:
    """Within it gloo takes copies on the host alone; gives the exchanges that there were."""
    copies: list[Tensor] = []  # kept, so that their memory is nobody else's
    used: set[str] = set()

    def is_on_host(tensor: Tensor) -> bool:
        memory = tensor.untyped_storage().data_ptr()
        return memory in {copy.untyped_storage().data_ptr() for copy in copies}

    def kept(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def made(tensor: Tensor) -> Tensor:
            copies.append(make(tensor))
            return copies[-1]

        return made

    empty_like = torch.empty_like

    def like(tensor: Tensor, **options: Any) -> Tensor:
        made = empty_like(tensor, **options)
        if is_on_host(tensor):
            copies.append(made)
        return made

    def watched(name: str, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def run(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert is_on_host(tensor)
            used.add(name)
            return exchange(tensor, *args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for module in (staging, collectives, direct, p2p):
            patch.setattr(module, "goes_through_host", lambda tensor, group: group is not None)
            for name in ("on_host", "room_on_host"):
                patch.setattr(module, name, kept(getattr(staging, name)), raising=False)
        patch.setattr(torch, "empty_like", like)
        for name in _EXCHANGES:
            patch.setattr(dist, name, watched(name, getattr(dist, name)))
        yield used


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
    with _all_tensors_on_an_accelerator() as used:
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
    with _all_tensors_on_an_accelerator() as used:
        assert _losses(parallel) == expected
    assert used
