"""The generators of schedules, and their names on the command line.

A generator is a pure function from (stages, micro-batches) to a table; `megatron.pipeline.actions`
says what a table is. Both schedules here hold one stage per rank. `p` stages, `m` micro-batches:

    gpipe   all forward passes, then all backward passes; every rank holds m activations
    1f1b    as few forward passes as the pipeline needs to fill, then one backward pass for each
            forward pass; stage s holds min(p - s, m) activations
            (PipeDream-Flush, arXiv 2006.09503; arXiv 2104.04473 section 2.2)

Both idle for p - 1 forward and backward passes; 1F1B needs less memory.

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from megatron.pipeline.actions import Action, Kind, Schedule


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forward passes, then all backward passes.

    Raises:
        ValueError: there is no stage or no micro-batch.
    """
    return _one_stage_per_rank(stages, micro_batches, lambda stage: micro_batches)


def one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """As many forward passes ahead as there are stages behind, then forward and backward in turn.

    Raises:
        ValueError: there is no stage or no micro-batch.
    """
    return _one_stage_per_rank(stages, micro_batches, lambda stage: stages - stage)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def make_schedule(name: str, stages: int, micro_batches: int) -> Schedule:
    """The schedule of this name, as --pipeline-schedule gives it.

    Raises:
        ValueError: the name is unknown, or there is no stage or no micro-batch.
    """
    if name not in SCHEDULES:
        raise ValueError(f"--pipeline-schedule {name} is none of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](stages, micro_batches)


def _one_stage_per_rank(
    stages: int, micro_batches: int, in_flight: Callable[[int], int]
) -> Schedule:
    """Each stage's table, where `in_flight` gives how many micro-batches the stage may hold."""
    if stages < 1 or micro_batches < 1:
        raise ValueError(
            f"a pipeline needs stages and micro-batches, found {stages} and {micro_batches}"
        )
    ranks = (_table(stage, micro_batches, in_flight(stage)) for stage in range(stages))
    return Schedule(tuple(ranks), placement=tuple(range(stages)))


def _table(stage: int, micro_batches: int, in_flight: int) -> tuple[Action, ...]:
    forward = [Action(stage, Kind.FORWARD, i) for i in range(micro_batches)]
    backward = [Action(stage, Kind.BACKWARD, i) for i in range(micro_batches)]
    ahead = min(in_flight, micro_batches) - 1
    steady = micro_batches - ahead
    turns = chain.from_iterable(zip(forward[ahead:], backward[:steady], strict=True))
    return (*forward[:ahead], *turns, *backward[steady:])
