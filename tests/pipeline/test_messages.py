"""The compiled steps carry every message once, and no order of events can make ranks deadlock."""

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron.pipeline.actions import Kind, Schedule, parse_schedule
from megatron.pipeline.messages import (
    ACTIONS_AHEAD,
    Edge,
    Message,
    Step,
    check_order,
    compile_ranks,
    compile_steps,
    edges,
)
from megatron.pipeline.schedule import SCHEDULES, make_schedule
from tests.pipeline.tables import PLACEMENTS, made_schedules, random_schedule

FEW = settings(max_examples=300, deadline=None, derandomize=True)
MADE = made_schedules(6, 8)
DRAWN = st.builds(
    random_schedule, st.sampled_from(PLACEMENTS), st.integers(1, 4), st.integers(0, 10**6)
)


def compiled(schedule: Schedule) -> list[tuple[Step, ...]]:
    try:
        check_order(schedule)
    except ValueError:
        assume(False)
    return [compile_steps(schedule, rank) for rank in range(schedule.num_ranks)]


@FEW
@given(st.one_of(MADE, DRAWN), st.booleans())
def test_the_steps_are_the_table_and_every_message_has_two_ends(
    schedule: Schedule, evaluate: bool
) -> None:
    if evaluate:
        schedule = schedule.forward_only()
    ranks = compiled(schedule)
    assert tuple(tuple(step.action for step in steps) for steps in ranks) == schedule.ranks
    steps = [step for steps in ranks for step in steps]
    sent = sorted(step.sent for step in steps if step.sent)
    received = sorted(step.received for step in steps if step.received)
    assert sent == received
    boundaries = schedule.num_stages - 1
    assert len(sent) == schedule.num_micro_batches * boundaries * (1 if evaluate else 2)
    over_the_wire = [m for m in received if not m.is_local]
    assert sorted(m for step in steps for m in step.post) == over_the_wire
    assert set(edges(schedule)) == {m.edge for m in over_the_wire}


@settings(FEW, max_examples=60)
@given(st.one_of(MADE, DRAWN), st.booleans())
def test_ranks_compiled_together_are_those_compiled_alone(
    schedule: Schedule, evaluate: bool
) -> None:
    schedule = schedule.forward_only() if evaluate else schedule
    alone = compiled(schedule)
    assert compile_ranks(schedule, range(schedule.num_ranks)) == alone


@FEW
@given(st.one_of(MADE, DRAWN))
def test_receives_are_opened_early_and_few(schedule: Schedule) -> None:
    for steps in compiled(schedule):
        for index, step in enumerate(steps):
            ahead = {m.consumer for m in step.post}
            window = {s.action for s in steps[index : index + ACTIONS_AHEAD + 1]}
            assert ahead <= window
            if step.received is not None and not step.received.is_local:
                earlier = steps[max(0, index - ACTIONS_AHEAD)]
                assert step.received in earlier.post


@FEW
@given(st.one_of(MADE, DRAWN), st.booleans(), st.integers(0, 10**6))
def test_in_any_order_of_events_all_steps_run_and_nothing_is_let_go_early(
    schedule: Schedule, evaluate: bool, seed: int
) -> None:
    """Ranks advance in random order; a send is over when its receiver has taken the message."""
    if evaluate:
        schedule = schedule.forward_only()
    ranks = compiled(schedule)
    draw = random.Random(seed)
    wires: dict[Edge, list[Message]] = {edge: [] for edge in edges(schedule)}
    opened: dict[Edge, list[Message]] = {edge: [] for edge in edges(schedule)}
    taken: set[Message] = set()
    position = [0] * len(ranks)
    while active := [r for r, steps in enumerate(ranks) if position[r] < len(steps)]:
        able = []
        for rank in active:
            step = ranks[rank][position[rank]]
            message = step.received
            if message is None or message.is_local or message in wires[message.edge]:
                assert evaluate or taken.issuperset(step.delivered)
                if taken.issuperset(step.delivered):
                    able.append(rank)
        rank = draw.choice(able)  # fails on an empty list: a deadlock
        step = ranks[rank][position[rank]]
        position[rank] += 1
        for message in step.post:
            opened[message.edge].append(message)
        if step.received is not None and not step.received.is_local:
            edge = step.received.edge
            assert wires[edge].pop(0) == opened[edge].pop(0) == step.received
            taken.add(step.received)
        if step.sent is not None and not step.sent.is_local:
            wires[step.sent.edge].append(step.sent)
    assert not any(wires.values())
    assert not any(opened.values())


def test_an_activation_is_let_go_when_its_gradient_comes_back() -> None:
    """1F1B, stage 0 of 2: at each backward pass the activation that was sent for it."""
    steps = compile_steps(make_schedule("1f1b", 2, 4), rank=0)
    for step in steps:
        sent = [str(message.producer) for message in step.delivered]
        number = step.action.micro_batch
        assert sent == ([f"0F{number}"] if step.action.kind is Kind.BACKWARD else [])


def most_held(steps: tuple[Step, ...]) -> int:
    held = peak = 0
    for step in steps:
        held += (step.sent is not None) - len(step.delivered)
        peak = max(peak, held)
    return peak


def test_1f1b_holds_few_sent_tensors_however_many_micro_batches() -> None:
    assert all(most_held(steps) <= 2 * 4 for steps in compiled(make_schedule("1f1b", 4, 50)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_evaluation_holds_two_sent_tensors_however_many_micro_batches(name: str) -> None:
    ranks = compiled(make_schedule(name, 4, 50).forward_only())
    assert [most_held(steps) for steps in ranks] == [2, 2, 2, 0]


def test_evaluation_of_a_ring_of_virtual_stages_keeps_as_many_sends_open_as_it_needs() -> None:
    """Rank 0 needs the results of rank 1 on the very messages that it would wait for."""
    rounds = 4
    first = [f"{stage}F{i}" for stage in (0, 2) for i in range(rounds)]
    second = [f"{stage}F{i}" for stage in (1, 3) for i in range(rounds)]
    ranks = compiled(parse_schedule(" ".join(first) + "\n" + " ".join(second)))
    assert [most_held(steps) for steps in ranks] == [4, 4]


def test_messages_that_change_places_on_an_edge_are_refused() -> None:
    schedule = parse_schedule("0F0 0F1 0B0 0B1\n1F1 1F0 1B0 1B1")
    with pytest.raises(ValueError, match=r"rank 0 sends .* 0F0 when rank 1 wants .* 0F1:"):
        compile_steps(schedule, rank=0)
