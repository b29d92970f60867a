"""Schedules are made for the costs that are stated, or that the first steps were found to take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron.config import ParallelConfig
from megatron.mpu import ParallelState, Topology
from megatron.pipeline.actions import Kind, Schedule
from megatron.pipeline.schedule import make_schedule
from megatron.pipeline.simulator import Costs
from megatron.training.plan import MEASURED_STEPS, WARM_UP_STEPS, Planner
from tests.distributed import distributed

MICRO_BATCHES = 6


class _Runtime:
    """Measures what it is told to; counts how often it was planned anew."""

    def __init__(self, seconds: list[dict[Kind, float]]) -> None:
        self._seconds = iter(seconds)
        self.measured = self.replanned = 0

    @contextmanager
    def measure(self) -> Iterator[_Runtime]:
        self.measured += 1
        yield self

    def means(self) -> dict[Kind, float]:
        return next(self._seconds)

    def replan(self, plan: Planner) -> None:
        self.replanned += 1


def _seconds(forward: float, backward: float, weight: float) -> dict[Kind, float]:
    return {Kind.FORWARD: forward, Kind.BACKWARD: backward, Kind.WEIGHT: weight}


def _planned(costs: Costs | None) -> Schedule:
    return make_schedule("zb-2p", 2, MICRO_BATCHES, costs=costs)


@distributed(2)
def test_ranks_agree_on_the_slowest_of_them() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    plan = Planner(ParallelConfig(pipeline_schedule="zb-2p"), state, stages=2)
    assert plan(MICRO_BATCHES) == _planned(None)
    own = [_seconds(1, 3, 0.1), _seconds(1, 1, 0.4)][dist.get_rank()]
    slow_start = {kind: 100 * time for kind, time in own.items()}
    runtime = _Runtime([slow_start] * WARM_UP_STEPS + [own] * MEASURED_STEPS)
    for _ in range(10):
        assert runtime.replanned == (runtime.measured == WARM_UP_STEPS + MEASURED_STEPS)
        with plan.observe(runtime):  # type: ignore[arg-type]
            pass
    assert runtime.measured == WARM_UP_STEPS + MEASURED_STEPS
    assert plan(MICRO_BATCHES) == _planned(Costs(1, 3, 0.4)) != _planned(None)


def test_nothing_is_measured_where_nothing_depends_on_it() -> None:
    stated = ParallelConfig(pipeline_schedule="zb-2p", pipeline_costs=(1.0, 3.0, 0.4, 0.0))
    runtime = _Runtime([])
    for parallel in (stated, ParallelConfig(pipeline_schedule="zb-2p"), ParallelConfig()):
        with Planner(parallel, ParallelState.single(), stages=1).observe(
            runtime  # type: ignore[arg-type]
        ):
            pass
    assert runtime.measured == runtime.replanned == 0
