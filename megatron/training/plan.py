"""Which schedule the pipeline follows, and how zb-2p comes to know what it is planned by.

zb-2p is the best order of forward passes, input gradients and weight gradients for the times that
these take. Where --pipeline-costs does not state them, the run begins with the order for equal
times, measures its first steps, and goes on with the order for what it has found: the means over
steps, the largest over ranks, so that all of them plan alike. Messages then count as free.

An order changes when gradients are computed and not in which order they add up. So a run does not
depend on what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron.config import ParallelConfig
from megatron.mpu import ParallelState
from megatron.mpu.collectives import MAX, all_reduce
from megatron.pipeline.actions import Kind, Schedule
from megatron.pipeline.runtime import PipelineRuntime
from megatron.pipeline.schedule import make_schedule
from megatron.pipeline.simulator import Costs

WARM_UP_STEPS, MEASURED_STEPS = 1, 3


class Planner:
    """Makes the schedule for a number of micro-batches; all ranks make the same one.

    `stages` is the number of stages of the model, virtual ones included.
    """

    def __init__(self, parallel: ParallelConfig, state: ParallelState, stages: int) -> None:
        self._name = parallel.schedule
        self._state = state
        self._virtual = stages // state.pipeline.size
        self._costs = None if parallel.pipeline_costs is None else Costs(*parallel.pipeline_costs)
        self._made: dict[int, Schedule] = {}
        has_to = self._name == "zb-2p" and self._costs is None and state.pipeline.size > 1
        self._steps_to_go = WARM_UP_STEPS + MEASURED_STEPS if has_to else 0
        self._measured = torch.zeros(len(Kind), dtype=torch.float64)

    def __call__(self, micro_batches: int) -> Schedule:
        """The schedule of a step of so many micro-batches."""
        if micro_batches not in self._made:
            self._made[micro_batches] = make_schedule(
                self._name,
                self._state.pipeline.size,
                micro_batches,
                virtual=self._virtual,
                costs=self._costs,
            )
        return self._made[micro_batches]

    @contextmanager
    def observe(self, runtime: PipelineRuntime) -> Iterator[None]:
        """Around each step of training: measures the first ones and has the others planned anew."""
        if self._steps_to_go == 0:
            yield
            return
        with runtime.measure() as durations:
            yield
        seconds = durations.means()
        if self._steps_to_go <= MEASURED_STEPS:
            self._measured += torch.tensor([seconds.get(kind, 0.0) for kind in Kind])
        self._steps_to_go -= 1
        if self._steps_to_go == 0:
            self._plan_by(self._measured / MEASURED_STEPS)
            runtime.replan(self)

    def _plan_by(self, seconds: torch.Tensor) -> None:
        """Makes schedules for what the slowest rank has measured."""
        state = self._state
        longest = seconds.to(state.device)
        all_reduce(all_reduce(longest, state.model, MAX), state.data, MAX)
        self._costs = Costs(*longest.tolist())
        self._made.clear()
