"""What a dry run says is what real ranks then hold and send.

Small networks are planned for as many CPUs as they are then trained on. Of each real rank the
storages are counted, those that live at one time in a step are watched, and every call below
`torch.distributed` is recorded.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.planner.dry_run import dry_run
from megatron.planner.hardware import load_hardware
from megatron.planner.plan import RankPlan
from tests.distributed import run_distributed
from tests.parity.runs import Case, new_trainer, own_batches
from tests.parity.wire import recorded
from tools.parity.tasks import TASKS

KINDS = {"allreduce": "all-reduce", "send": "send", "recv": "recv"}
LARGE = {
    "hidden_size": 64,
    "seq_length": 48,
    "max_position_embeddings": 48,
    "micro_batch_size": 2,
    "fp64": False,
    "vocab_size": 211,
    "gradient_bucket_size": 40_000,
}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one process": ("gpt", 1, {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "tensor, sequence, data": (
        "gpt",
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "hidden_dropout": 0.1},
    ),
    "pipeline, sharded optimizer": (
        "gpt",
        4,
        {
            "pipeline_model_parallel_size": 2,
            "use_distributed_optimizer": True,
            "pipeline_layers": (3, 2),
        },
    ),
    "interleaved": (
        "gpt",
        4,
        {
            "pipeline_model_parallel_size": 2,
            "tensor_model_parallel_size": 2,
            "num_layers": 4,
            "num_layers_per_virtual_pipeline_stage": 1,
        },
    ),
    "bert, selective": (
        "bert",
        4,
        {
            "num_layers": 4,
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "recompute_granularity": "selective",
            "attention_dropout": 0.1,
        },
    ),
    "t5": ("t5", 4, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "llama, sharded gradients": (
        "llama",
        4,
        {
            "tensor_model_parallel_size": 2,
            "use_distributed_optimizer": True,
            "shard_gradients": True,
        },
    ),
    "zero bubble, recomputed, half": (
        "gpt",
        4,
        {
            "pipeline_model_parallel_size": 4,
            "num_layers": 8,
            "pipeline_schedule": "zb-h1",
            "recompute_granularity": "full",
            "bf16": True,
        },
    ),
}
MICRO_BATCHES = 6


@dataclass(frozen=True)
class Observed:
    """What a real rank held and did in a step."""

    place: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    calls: Counter[tuple[str, int, int]]


def _case(name: str) -> Case:
    network, ranks, flags = LAYOUTS[name]
    case = Case.of(network, ranks, **LARGE | flags)
    return case.with_flags(
        global_batch_size=MICRO_BATCHES * LARGE["micro_batch_size"] * case.data_size
    )


def _observe(name: str) -> Observed:
    case = _case(name)
    trainer = new_trainer(case)
    state, size = trainer.state, trainer.ramp.full
    trainer.step(own_batches(case, 0, size, state.data.rank))
    samples = own_batches(case, 1, size, state.data.rank)
    optimizer = trainer.optimizer
    buffers = optimizer.gradients.buffers
    gradients = [b.gradients for b in buffers if b.gradients is not None]
    gradients += [shard.gradients for shard in optimizer.gradients.shards]
    optimizer_state = [part for _, part, *_ in optimizer.state_tensors()]
    weights = [p for chunk in trainer.chunks for p in chunk.parameters()]
    with _Living() as living:
        batches = [{key: field.clone() for key, field in batch.items()} for batch in samples]
        with recorded() as calls:
            trainer.step(batches)
    with recorded() as gathered:
        trainer.optimizer.finish_gather()
    assert not gathered
    trainer.finish()
    return Observed(
        state.pipeline.rank,
        _bytes(weights),
        _bytes(gradients),
        _bytes(weights + optimizer_state) - _bytes(weights),
        living.most,
        _totals((KINDS[call.kind], len(call.ranks), call.bytes, n) for call, n in calls.items()),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


class _Living(TorchDispatchMode):
    """The most bytes of real tensors, made within it, that live at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                if place not in known and place not in self._sizes:
                    self._sizes[place] = storage.nbytes()
                    weakref.finalize(storage, self._end, place)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
        return result

    def _end(self, place: int) -> None:
        self.now -= self._sizes.pop(place)


def _totals(calls: Iterable[tuple[str, int, int, int]]) -> Counter[tuple[str, int, int]]:
    """(kind, ranks, 0) -> calls, and (kind, ranks, 1) -> bytes."""
    found: Counter[tuple[str, int, int]] = Counter()
    for kind, ranks, size, count in calls:
        found[kind, ranks, 0] += count
        found[kind, ranks, 1] += size * count
    return found


def _planned(rank: RankPlan) -> Counter[tuple[str, int, int]]:
    found: Counter[tuple[str, int, int]] = Counter()
    for total in rank.communications:
        found[total.kind, total.ranks, 0] += total.count
        found[total.kind, total.ranks, 1] += total.bytes
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_plan_is_what_ranks_hold_and_send(name: str) -> None:
    case = _case(name)
    config = case.config()
    plan = dry_run(config, TASKS[config.model.model_type], case.ranks, load_hardware("h100-sxm"))
    for seen in run_distributed(case.ranks, _observe, name):
        planned = plan.ranks[seen.place]
        assert seen.weights == planned.weights
        assert seen.gradients == planned.gradients
        assert seen.optimizer == planned.optimizer
        assert seen.calls == _planned(planned)
        assert planned.activations == pytest.approx(seen.activations, rel=0.1)
