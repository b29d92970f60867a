"""Schedules to test with: made by every generator, and valid ones of any placement at random."""

import random

from hypothesis import strategies as st

from megatron.pipeline.actions import Action, Kind, Schedule
from megatron.pipeline.schedule import SCHEDULES, make_schedule

# One stage per rank, interleaved virtual stages, stages in the shape of a V, one rank.
PLACEMENTS = ((0, 1), (0, 1, 2, 3), (0, 1, 0, 1), (0, 1, 2, 0, 1, 2), (0, 1, 2, 2, 1, 0), (0, 0))


def random_schedule(placement: tuple[int, ...], micro_batches: int, seed: int) -> Schedule:
    """A valid schedule: the order in which ranks happen to run whatever they can run.

    Micro-batches pass each stage in order. For some seeds backward passes are split, of all
    micro-batches or of a few.
    """
    draw = random.Random(seed)
    split_rate = draw.choice((0.0, 0.5, 1.0))
    left = {
        (stage, kind): [
            Action(stage, kind, i)
            for i in range(micro_batches)
            if kind is not Kind.WEIGHT or draw.random() < split_rate
        ]
        for stage in range(len(placement))
        for kind in Kind
    }
    ranks: list[list[Action]] = [[] for _ in range(max(placement) + 1)]
    whole = Schedule((), placement)
    done: set[Action] = set()
    while heads := [actions[0] for actions in left.values() if actions]:
        action = draw.choice([a for a in heads if done.issuperset(whole.inputs(a))])
        left[action.stage, action.kind].pop(0)
        ranks[placement[action.stage]].append(action)
        done.add(action)
    return Schedule(tuple(map(tuple, ranks)), placement)


@st.composite
def made_schedules(draw: st.DrawFn, ranks: int, micro_batches: int) -> Schedule:
    """A schedule of any name for at most so many ranks and micro-batches."""
    name = draw(st.sampled_from(SCHEDULES))
    virtual = draw(st.integers(1, 3)) if name == "interleaved" else 1
    sizes = draw(st.integers(1, ranks)), draw(st.integers(1, micro_batches))
    return make_schedule(name, *sizes, virtual=virtual)
