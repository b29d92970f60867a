"""Tables print and parse, and validation finds whatever is wrong with one."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.pipeline.actions import (
    Action,
    DeadlockError,
    Kind,
    Schedule,
    format_schedule,
    in_dependency_order,
    parse_schedule,
    validate,
)
from megatron.pipeline.schedule import one_f_one_b
from tests.pipeline.tables import PLACEMENTS, random_schedule

FEW = settings(max_examples=200, deadline=None, derandomize=True)
TABLES = st.builds(
    random_schedule, st.sampled_from(PLACEMENTS), st.integers(1, 6), st.integers(0, 10**6)
)


@pytest.mark.parametrize("text", ["2F0", "0B13", "10W7"])
def test_an_action_prints_as_it_parses(text: str) -> None:
    assert str(Action.parse(text)) == text


def test_an_action_has_stage_kind_and_micro_batch() -> None:
    assert Action.parse("10W7") == Action(stage=10, kind=Kind.WEIGHT, micro_batch=7)


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "-1F0", "2F0 ", "2f0", "2F0F1"])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no action; expected one like 2F0"):
        Action.parse(text)


@FEW
@given(TABLES)
def test_a_table_prints_as_it_parses(schedule: Schedule) -> None:
    assert parse_schedule(format_schedule(schedule)) == schedule


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0F0 0B0\n1F0 oops", "line 2: 'oops' is no action"),
        ("0F0 0B0\n0F1 0B1", "line 2: 0F1 stands on rank 1, but stage 0 is on rank 0"),
        ("0F0 0B0\n2F0 2B0", "stage 1 has no actions, but stage 2 has"),
    ],
)
def test_what_is_no_table_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_schedule(text)


@FEW
@given(TABLES)
def test_a_valid_table_is_valid(schedule: Schedule) -> None:
    validate(schedule)


@FEW
@given(TABLES)
def test_dependency_order_holds_every_action_after_what_it_needs(schedule: Schedule) -> None:
    order = list(in_dependency_order(schedule))
    place = {action: i for i, (_, action) in enumerate(order)}
    assert place.keys() == schedule.actions
    assert all(place[needed] < place[a] for a in place for needed in schedule.inputs(a))
    for rank, table in enumerate(schedule.ranks):
        assert tuple(action for holder, action in order if holder == rank) == table


@FEW
@given(TABLES, st.data())
def test_a_missing_pass_is_found(schedule: Schedule, data: st.DataObject) -> None:
    lost = data.draw(st.sampled_from(sorted(schedule.actions)))
    broken = tuple(tuple(a for a in table if a != lost) for table in schedule.ranks)
    if lost.kind is Kind.WEIGHT:
        validate(Schedule(broken, schedule.placement))  # its backward pass is then not split
    elif schedule.num_micro_batches > 1:
        with pytest.raises(ValueError, match=f"{lost} is missing from the schedule"):
            validate(Schedule(broken, schedule.placement))


@pytest.mark.parametrize(
    ("ranks", "placement", "problem"),
    [
        ((), (), "the schedule is empty"),
        (("0F0 0B0 0F0",), (0,), "0F0 stands in the schedule twice"),
        (("0F0 1F0 0B0", "1B0"), (0, 1), "1F0 stands on rank 0, which does not hold its stage"),
        (("0F0 7F0 0B0",), (0,), "7F0 stands on rank 0, which does not hold its stage"),
    ],
)
def test_a_wrong_table_is_refused(
    ranks: tuple[str, ...], placement: tuple[int, ...], problem: str
) -> None:
    tables = tuple(tuple(map(Action.parse, line.split())) for line in ranks)
    with pytest.raises(ValueError, match=problem):
        validate(Schedule(tables, placement))


def test_a_deadlock_names_the_actions_that_wait_for_one_another() -> None:
    schedule = parse_schedule(
        """
        0F0 0B0 0F1 0B1
        1F0 1F1 1B0 1B1
        2F0 2F1 2B0 2B1
        """
    )
    with pytest.raises(DeadlockError) as caught:
        validate(schedule)
    waits = [tuple(map(str, pair)) for pair in caught.value.waiting]
    assert waits == [("0B0", "1B0"), ("1F1", "0F1")]
    assert "rank 0 waits at 0B0 for 1B0 of rank 1" in str(caught.value)
    assert "rank 1 waits at 1F1 for 0F1 of rank 0" in str(caught.value)


def test_a_rank_that_waits_for_itself_is_a_deadlock() -> None:
    with pytest.raises(DeadlockError, match="rank 0 waits at 0B0 for 0F0 of rank 0"):
        validate(parse_schedule("0B0 0F0"))


def test_an_input_that_no_rank_makes_is_a_deadlock() -> None:
    schedule = parse_schedule("0F0 0B0\n1F0 1F1 1B1")
    with pytest.raises(DeadlockError, match="rank 0 waits at 0B0 for 1B0 which no rank runs"):
        list(in_dependency_order(schedule))


def test_the_forward_passes_alone_keep_their_order() -> None:
    assert str(one_f_one_b(2, 3).forward_only()) == "0F0 0F1 0F2\n1F0 1F1 1F2"


def test_schedules_and_simulator_need_no_torch() -> None:
    code = (
        "import sys, megatron.pipeline.simulator, megatron.pipeline.schedule\n"
        "import megatron.pipeline.messages\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
