"""The fastest layouts of a model on a cluster, of all that fit its GPUs.

Each layout climbs three steps, each dearer and surer than the one before:

    estimate    (`megatron.planner.estimate`)  under a millisecond, on the low side; first of all as
                if nothing were recomputed and no pass split, so that not every way is recorded
    composed    (`megatron.planner.parts`)     a tenth of a second or so, seldom a few percent off
    confirmed   (`megatron.planner.dry_run`)   seconds: the figures that are shown

A queue holds all of them by time, and the first always takes its next step. One that comes first
when it is confirmed already is the next best of all, as far as the cheaper figures do not lie too
high. The same question has the same answer: nothing depends on how fast the machine is.
"""

from __future__ import annotations

import gc
import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.planner.dry_run import Recorded, put_together, record
from megatron.planner.estimate import Estimate, Estimator
from megatron.planner.hardware import Hardware
from megatron.planner.layouts import Layout, Layouts, divisors
from megatron.planner.parts import PartBook, Way
from megatron.planner.plan import Plan
from megatron.planner.report import peak_bytes
from megatron.training.task import Task

SHOWN = 10
# Layouts that are composed and confirmed at the most, for each that is wanted.
MOST_COMPOSED, MOST_CONFIRMED = 30, 3
# Dry runs more than these, so that a search for one or two does not end at a few that just fail.
MORE_CONFIRMED = 10
# What the cheaper figures may lie too high by: of time, and of memory before a layout is given up.
SLACK = {"looked at": 0.99, "estimate": 0.97, "composed": 0.995}
MEMORY_SLACK = {"estimate": 0.97, "composed": 0.98}
LARGEST_CLUSTER = 1 << 16

Say = Callable[[str], None]
MakeTask = Callable[[Config], Task]


@dataclass(frozen=True)
class Found:
    """A layout that was confirmed, with what a dry run says of it."""

    layout: Layout
    recorded: Recorded
    plan: Plan


@dataclass(frozen=True)
class TooLarge:
    """A layout that does not fit: the bytes that its fullest GPU needs, and how they are known."""

    layout: Layout
    bytes: int
    step: str


@dataclass
class Search:
    """What a search has found.

    Attributes:
        base: the configuration, but for the layout.
        gpus, hardware, usable: the cluster, and the bytes of a GPU that a layout may take.
        best: the fastest layouts, in order.
        tried, rejected: valid layouts; choices that the validation turned down.
        too_large: by layout, those that were found not to fit.
        composed, confirmed: how many got so far.
        needed: bytes of the fullest GPU, of each layout that was looked at, by the best figure.
        least_gpus: where nothing fits, a number of GPUs on which something does, if any was found.
    """

    base: Config
    gpus: int
    hardware: Hardware
    usable: int
    best: list[Found] = field(default_factory=list)
    tried: int = 0
    rejected: int = 0
    too_large: dict[Layout, TooLarge] = field(default_factory=dict)
    composed: int = 0
    confirmed: int = 0
    needed: dict[Layout, int] = field(default_factory=dict)
    least_gpus: int | None = None

    @property
    def closest(self) -> TooLarge | None:
        """Of the layouts that do not fit, the one that is least too large."""
        return min(self.too_large.values(), key=lambda each: each.bytes, default=None)


def search(
    base: Config,
    make_task: MakeTask,
    gpus: int,
    hardware: Hardware,
    *,
    fixed: Mapping[str, Any] | None = None,
    margin: int = 0,
    wanted: int = SHOWN,
    say: Say = lambda line: None,
) -> Search:
    """The fastest layouts.

    Args:
        base: the model and the batch; its layout does not count, but for flags that only go with
            one, such as --pipeline-layers. It knows its vocabulary.
        fixed: values of a layout's fields that are not to be searched.
        margin: bytes of a GPU to be left free, beyond what the hardware's file reserves.
        wanted: how many layouts are to be found.
        say: takes a line on how it goes on.

    Raises:
        ConfigError: no layout is valid, or the batch is not stated.
    """
    if base.train.global_batch_size is None:
        raise ConfigError("--global-batch-size is required: layouts are compared on the same batch")
    found = Search(base, gpus, hardware, hardware.memory - hardware.reserved - margin)
    book = PartBook(base, make_task)
    for sizes in _tensor_sizes(gpus, hardware, fixed or {}):
        layouts = Layouts(base, fixed or {}, gpus, sizes)
        valid = list(layouts)
        found.tried += len(valid)
        found.rejected += layouts.rejected
        say(f"{len(valid):,} valid layouts with tensor sizes {', '.join(map(str, sizes))}")
        if valid:
            _Race(found, book, make_task, valid, say).run(wanted)
        if found.best:
            return found
    if not found.tried:
        raise ConfigError(
            f"no layout of {gpus} GPUs is valid: --global-batch-size "
            f"{base.train.global_batch_size} or the model's sizes do not divide that way"
        )
    found.least_gpus = _least_gpus(found, book, make_task, fixed or {}, say)
    return found


def _tensor_sizes(gpus: int, hardware: Hardware, fixed: Mapping[str, Any]) -> Iterator[list[int]]:
    """Those inside a node; then, where nothing fits, those across nodes."""
    if "tensor_model_parallel_size" in fixed:
        yield [fixed["tensor_model_parallel_size"]]
        return
    sizes = divisors(gpus)
    yield [size for size in sizes if size <= hardware.gpus_per_node]
    if beyond := [size for size in sizes if size > hardware.gpus_per_node]:
        yield beyond


class _Race:
    """The queue of one search."""

    def __init__(
        self, found: Search, book: PartBook, make_task: MakeTask, layouts: list[Layout], say: Say
    ) -> None:
        self._found, self._book, self._make_task, self._say = found, book, make_task, say
        self._estimator = Estimator(found.base, make_task, book, found.gpus, found.hardware)
        self._confirmed: dict[Layout, Found] = {}
        self._fastest: dict[Layout, Estimate] = {}
        self._composed_here = 0
        self._queue: list[tuple[float, int, str, Layout]] = []
        self._order = {layout: place for place, layout in enumerate(layouts)}

    def run(self, wanted: int) -> None:
        """Find as many of the best."""
        # What is there already need not be looked through after each recording.
        gc.collect()
        gc.freeze()
        try:
            for layout in self._order:
                self._look_at(layout)
            self._say(f"{len(self._queue):,} of them may fit")
            while self._queue and len(self._found.best) < wanted:
                self._next(wanted)
        finally:
            gc.unfreeze()

    def _push(self, seconds: float, step: str, layout: Layout) -> None:
        heapq.heappush(self._queue, (seconds, self._order[layout], step, layout))

    def _next(self, wanted: int) -> None:
        """The next step of the fastest."""
        _, _, step, layout = heapq.heappop(self._queue)
        match step:
            case "looked at":
                self._estimate(layout)
            case "estimate" if self._composed_here < MOST_COMPOSED * wanted:
                self._compose(layout)
            case "composed" if self._found.confirmed < MOST_CONFIRMED * wanted + MORE_CONFIRMED:
                self._confirm(layout)
            case "confirmed":
                self._found.best.append(self._confirmed[layout])

    def _look_at(self, layout: Layout) -> None:
        """An estimate in the fastest way, and of the memory that does not depend on it."""
        is_full = layout.recompute_granularity == "full"
        alike = replace(
            layout,
            sequence_parallel=layout.tensor_model_parallel_size > 1 and self._can_split(layout),
            recompute_granularity="full" if is_full else None,
        )
        if alike not in self._fastest:
            way = replace(Way.of(alike), recompute=None, is_split=False)
            self._fastest[alike] = self._estimator.estimate(alike, way)
        estimate = self._fastest[alike]
        if self._fits(layout, estimate.static, "estimate"):
            self._push(SLACK["looked at"] * estimate.seconds, "looked at", layout)

    def _can_split(self, layout: Layout) -> bool:
        data, tensor = self._found.base.data, layout.tensor_model_parallel_size
        return data.seq_length % tensor == 0 and data.decoder_length % tensor == 0

    def _estimate(self, layout: Layout) -> None:
        before = self._book.recordings
        estimate = self._estimator.estimate(layout)
        if self._book.recordings // 10 > before // 10:
            self._say(f"{self._book.recordings} recordings of parts")
        if self._fits(layout, estimate.bytes, "estimate"):
            self._push(SLACK["estimate"] * estimate.seconds, "estimate", layout)

    def _compose(self, layout: Layout) -> None:
        self._composed_here += 1
        self._found.composed += 1
        plan = put_together(self._book.recorded(layout, self._found.gpus), self._found.hardware)
        if self._fits(layout, _fullest(plan), "composed"):
            self._push(SLACK["composed"] * plan.step_time, "composed", layout)

    def _confirm(self, layout: Layout) -> None:
        found = self._found
        found.confirmed += 1
        recorded = record(layout.applied_to(found.base), self._make_task, found.gpus)
        plan = put_together(recorded, found.hardware)
        if self._fits(layout, _fullest(plan), "confirmed"):
            self._confirmed[layout] = Found(layout, recorded, plan)
            self._push(plan.step_time, "confirmed", layout)
        self._say(f"{found.confirmed} dry runs, the last {plan.step_time:.4g} s per step")

    def _fits(self, layout: Layout, needed: int, step: str) -> bool:
        self._found.needed[layout] = needed
        if MEMORY_SLACK.get(step, 1.0) * needed <= self._found.usable:
            return True
        self._found.too_large[layout] = TooLarge(layout, needed, step)
        return False


def _fullest(plan: Plan) -> int:
    return max(map(peak_bytes, plan.ranks))


def _least_gpus(
    found: Search, book: PartBook, make_task: MakeTask, fixed: Mapping[str, Any], say: Say
) -> int | None:
    """The fewest GPUs, in whole nodes, on which an estimate fits, next to powers of two times."""
    node = found.hardware.gpus_per_node

    def something_fits(gpus: int) -> bool:
        say(f"does {gpus} GPUs' memory hold it?")
        estimator = Estimator(found.base, make_task, book, gpus, found.hardware)
        sizes = next(_tensor_sizes(gpus, found.hardware, fixed))
        return any(
            estimator.estimate(layout).bytes <= found.usable
            for layout in Layouts(found.base, fixed, gpus, sizes)
            if estimator.estimate(layout, _lightest(layout)).static <= found.usable
        )

    gpus = found.gpus
    while gpus <= LARGEST_CLUSTER:
        gpus = max(2 * gpus, node) // node * node if gpus >= node else 2 * gpus
        if something_fits(gpus):
            step = max(node, gpus // 16 // node * node)
            between = range(gpus // 2 + step, gpus, step) if gpus > node else ()
            return next((each for each in between if something_fits(each)), gpus)
    return None


def _lightest(layout: Layout) -> Way:
    """A way that is recorded anyway, for what does not depend on it."""
    return replace(Way.of(layout), sequence_parallel=False, recompute=None, is_split=False)
