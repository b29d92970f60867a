"""What real ranks hold, send and compute in a step, beside what a dry run says of them.

Of each real rank the storages are counted, those that live at one time in a step are watched, and
every call below `torch.distributed` is recorded.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.ops import kernels
from megatron.planner.dry_run import dry_run
from megatron.planner.hardware import load_hardware
from megatron.planner.plan import RankPlan
from megatron.training.task import Batch
from tests.distributed import run_distributed
from tests.parity.runs import Case, new_trainer, own_batches
from tests.parity.wire import recorded
from tools.parity.tasks import TASKS

TOLERANCE = 0.1
KINDS = {"allreduce": "all-reduce", "send": "send", "recv": "recv"}

# (kind, ranks, 0) -> calls, and (kind, ranks, 1) -> bytes
Totals = Counter[tuple[str, int, int]]


@dataclass(frozen=True)
class Observed:
    """What a real rank held and did in a step; bytes."""

    place: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    calls: Totals


def observe(case: Case) -> Observed:
    """A second step of this rank, watched; what the first has left behind counts."""
    with kernels.using(case.config().train.kernels), Living() as living:
        trainer = new_trainer(case)
        state, size = trainer.state, trainer.ramp.full
        trainer.step(_batches(case, 0, size, state.data.rank))
        samples = _batches(case, 1, size, state.data.rank)
        living.most = living.now
        with recorded() as calls:
            trainer.step(samples)
    with recorded() as gathered:
        trainer.optimizer.finish_gather()
    assert not gathered
    trainer.finish()
    optimizer = trainer.optimizer
    buffers = optimizer.gradients.buffers
    gradients = [b.gradients for b in buffers if b.gradients is not None]
    gradients += [shard.gradients for shard in optimizer.gradients.shards]
    optimizer_state = [part for _, part, *_ in optimizer.state_tensors()]
    weights = [p for chunk in trainer.chunks for p in chunk.parameters()]
    return Observed(
        state.pipeline.rank,
        _bytes(weights),
        _bytes(gradients),
        _bytes(weights + optimizer_state) - _bytes(weights),
        living.most - _bytes(weights + gradients + optimizer_state),
        _totals((KINDS[call.kind], len(call.ranks), call.bytes, n) for call, n in calls.items()),
    )


def _batches(case: Case, step: int, size: int, data_rank: int) -> list[Batch]:
    """Micro-batches of which nothing else is kept; a row is one document, as a plan takes it."""
    batches = own_batches(case, step, size, data_rank)
    for lengths in (batch["document_lengths"] for batch in batches if "document_lengths" in batch):
        lengths.zero_()[:, 0] = lengths.size(1)
    return [{key: field.clone() for key, field in batch.items()} for batch in batches]


@dataclass(frozen=True)
class Comparison:
    """What a plan says that is not so, and how far its activations are off.

    Attributes:
        deviation: of the rank whose planned peak is furthest off, as a share of the real one.
    """

    wrong: tuple[str, ...]
    deviation: float


def compare(case: Case) -> Comparison:
    """The dry run of the case beside a real run."""
    config = case.config()
    kind = TASKS[config.model.model_type]
    plan = dry_run(config, kind, case.ranks, load_hardware("h100-sxm"))
    wrong, deviations = [], [0.0]
    for rank, seen in enumerate(run_distributed(case.ranks, observe, case)):
        planned = plan.ranks[seen.place]
        deviations.append(planned.activations / seen.activations - 1)
        wrong += [f"rank {rank}: {what}" for what in _disagreements(planned, seen)]
    return Comparison(tuple(wrong), max(deviations, key=abs))


def _disagreements(planned: RankPlan, seen: Observed) -> Iterator[str]:
    for name in ("weights", "gradients", "optimizer"):
        said, found = getattr(planned, name), getattr(seen, name)
        if said != found:
            yield f"{name} {said} planned, {found} found"
    calls = _planned(planned)
    for key in sorted(calls.keys() | seen.calls.keys()):
        if calls[key] != seen.calls[key]:
            yield f"{key} {calls[key]} planned, {seen.calls[key]} found"
    if abs(planned.activations - seen.activations) > TOLERANCE * seen.activations:
        yield f"activations {planned.activations} planned, {seen.activations} found"


class Living(TorchDispatchMode):
    """The bytes of real tensors, made within it, that live now, and the most at one time."""

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


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _totals(calls: Iterable[tuple[str, int, int, int]]) -> Totals:
    found: Totals = Counter()
    for kind, ranks, size, count in calls:
        found[kind, ranks, 0] += count
        found[kind, ranks, 1] += size * count
    return found


def _planned(rank: RankPlan) -> Totals:
    found: Totals = Counter()
    for total in rank.communications:
        found[total.kind, total.ranks, 0] += total.count
        found[total.kind, total.ranks, 1] += total.bytes
    return found
