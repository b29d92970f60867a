"""The names of schedules on the command line, and the two simplest of them.

A generator is a pure function from numbers of ranks and micro-batches to a table;
`megatron.pipeline.actions` says what a table is. `p` ranks, `m` micro-batches:

    gpipe        all forward passes, then all backward passes; every rank holds m activations
    1f1b         as few forward passes as the pipeline needs to fill, then one backward pass for
                 each forward pass; rank s holds min(p - s, m) activations
                 (PipeDream-Flush, arXiv 2006.09503; arXiv 2104.04473 section 2.2)
    interleaved  1F1B with several chunks per rank (`megatron.pipeline.interleaved`)
    zb-h1        1F1B with a split backward pass and the same memory
    zb-2p        the best found that holds at most 2p (`megatron.pipeline.zero_bubble`)

The first two idle for p - 1 forward and backward passes; 1F1B needs less memory. On every stage
each kind of action takes the micro-batches in ascending order, so that gradients are summed in the
same order by all schedules.

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from megatron.pipeline.actions import Action, Kind, Schedule
from megatron.pipeline.interleaved import interleaved
from megatron.pipeline.simulator import Costs
from megatron.pipeline.zero_bubble import zb_2p, zb_h1

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-2p")


def make_schedule(
    name: str,
    ranks: int,
    micro_batches: int,
    *,
    virtual: int = 1,
    costs: Costs | None = None,
) -> Schedule:
    """The schedule of this name, as --pipeline-schedule gives it; the same arguments, the same one.

    Args:
        name: one of `SCHEDULES`.
        ranks: length of the pipeline.
        micro_batches: of a step, any number.
        virtual: chunks per rank; only the interleaved schedule has more than one.
        costs: of one stage, which the last three schedules are fitted to; gpipe and 1f1b are what
            they are.

    Raises:
        ValueError: the name is unknown, there is no rank, chunk or micro-batch, or the schedule
            has one chunk per rank and more are asked for.
    """
    if name not in SCHEDULES:
        raise ValueError(f"--pipeline-schedule {name} is none of {', '.join(SCHEDULES)}")
    if ranks < 1 or micro_batches < 1 or virtual < 1:
        raise ValueError(
            "a pipeline needs stages and micro-batches, "
            f"found {ranks * virtual} and {micro_batches}"
        )
    if name == "interleaved":
        return interleaved(ranks, micro_batches, virtual, costs)
    if virtual > 1:
        raise ValueError(
            f"--pipeline-schedule {name} has one chunk per rank, found {virtual}; "
            "several are for interleaved"
        )
    if name == "zb-h1":
        return zb_h1(ranks, micro_batches, costs)
    if name == "zb-2p":
        return zb_2p(ranks, micro_batches, costs)
    return (gpipe if name == "gpipe" else one_f_one_b)(ranks, micro_batches)


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forward passes, then all backward passes."""
    return _one_stage_per_rank(stages, micro_batches, lambda stage: micro_batches)


def one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """As many forward passes ahead as there are stages behind, then each kind in turn."""
    return _one_stage_per_rank(stages, micro_batches, lambda stage: stages - stage)


def _one_stage_per_rank(
    stages: int, micro_batches: int, in_flight: Callable[[int], int]
) -> Schedule:
    """Each stage's table, where `in_flight` gives how many micro-batches the stage may hold."""
    ranks = (_table(stage, micro_batches, in_flight(stage)) for stage in range(stages))
    return Schedule(tuple(ranks), placement=tuple(range(stages)))


def _table(stage: int, micro_batches: int, in_flight: int) -> tuple[Action, ...]:
    forward = [Action(stage, Kind.FORWARD, i) for i in range(micro_batches)]
    backward = [Action(stage, Kind.BACKWARD, i) for i in range(micro_batches)]
    ahead = min(in_flight, micro_batches) - 1
    steady = micro_batches - ahead
    turns = chain.from_iterable(zip(forward[ahead:], backward[:steady], strict=True))
    return (*forward[:ahead], *turns, *backward[steady:])
