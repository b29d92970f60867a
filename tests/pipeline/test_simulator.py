"""The simulator gives the published figures and keeps the rules of its model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.pipeline.actions import DeadlockError, Kind, Schedule, parse_schedule
from megatron.pipeline.schedule import gpipe, one_f_one_b
from megatron.pipeline.simulator import Costs, simulate
from tests.pipeline.tables import PLACEMENTS, random_schedule

FEW = settings(max_examples=200, deadline=None, derandomize=True)
TABLES = st.builds(
    random_schedule, st.sampled_from(PLACEMENTS), st.integers(1, 6), st.integers(0, 10**6)
)
COSTS = st.tuples(*(st.floats(0, 10) for _ in range(4)))  # as in Costs


def test_a_worked_example() -> None:
    """Two stages, two micro-batches, forward 1, backward 2 in halves, messages 0.5."""
    found = simulate(one_f_one_b(2, 2), Costs(1, 1, 1, 0.5))
    spans = {str(action): tuple(span) for action, span in found.spans.items()}
    assert spans == {
        "0F0": (0, 1),
        "0F1": (1, 2),
        "1F0": (1.5, 2.5),
        "1B0": (2.5, 4.5),
        "1F1": (4.5, 5.5),
        "0B0": (5, 7),
        "1B1": (5.5, 7.5),
        "0B1": (8, 10),
    }
    assert found.cost == 10
    assert found.bubble == pytest.approx(1 - 2 * 3 / 10)
    assert found.peak_activations == (2, 1)


def test_a_split_backward_holds_its_activation_until_the_weight_gradient() -> None:
    schedule = parse_schedule("0F0 0F1 0B0 0B1 0W0 0F2 0W1 0B2 0W2")
    found = simulate(schedule, Costs(1, 2, 4))
    assert found.cost == 3 * (1 + 2 + 4)
    assert found.peak_activations == (2,)
    assert simulate(parse_schedule("0F0 0B0 0F1 0W0 0B1 0W1"), Costs(1, 1)).peak_activations == (2,)


def test_what_a_split_backward_retains_may_be_a_share() -> None:
    schedule = parse_schedule("0F0 0B0 0F1 0B1 0F2 0W0 0W1 0B2 0W2")
    peaks = [simulate(schedule, Costs(1, 1, 1, retained=r)).peak_activations for r in (0, 0.4, 1)]
    assert peaks == [(1,), (1.8,), (3,)]


def test_costs_may_differ_between_stages() -> None:
    found = simulate(gpipe(2, 1), Costs((1, 2), (3, 4), weight=(5, 6), communication=(7, 8)))
    assert {str(a): tuple(span) for a, span in found.spans.items()} == {
        "0F0": (0, 1),
        "1F0": (8, 10),
        "1B0": (10, 20),
        "0B0": (28, 36),
    }


def test_cost_is_the_longest_time_from_a_ranks_own_first_action() -> None:
    found = simulate(parse_schedule("0F0 0B0 0W0\n1F0 1B0 1W0"), Costs(1, 1, weight=(1, 10)))
    assert max(span.end for span in found.spans.values()) == 13
    assert found.cost == 12  # rank 1 begins at 1
    assert found.bubble == pytest.approx(1 - (3 + 12) / (2 * 12))


def test_stages_of_one_rank_need_no_communication() -> None:
    found = simulate(parse_schedule("0F0 1F0 1B0 0B0"), Costs(1, 1, 1, communication=100))
    assert (found.cost, found.bubble) == (6, 0)


@FEW
@given(TABLES, COSTS)
def test_actions_keep_their_order_their_length_and_wait_for_messages(
    schedule: Schedule, costs: tuple[float, float, float, float]
) -> None:
    forward, backward, weight, communication = costs
    spans = simulate(schedule, Costs(*costs)).spans
    length = {Kind.FORWARD: forward, Kind.BACKWARD: backward, Kind.WEIGHT: weight}
    for rank, table in enumerate(schedule.ranks):
        free = 0.0
        for action in table:
            span = spans[action]
            unsplit = action.kind is Kind.BACKWARD and not schedule.is_split(action)
            expected = length[action.kind] + (weight if unsplit else 0.0)
            assert span.end - span.start == pytest.approx(expected)
            ready = free
            for needed in schedule.inputs(action):
                away = schedule.placement[needed.stage] != rank
                ready = max(ready, spans[needed].end + (communication if away else 0.0))
            assert span.start == ready  # no sooner, and no later
            free = span.end


@FEW
@given(TABLES, COSTS)
def test_cost_bubble_and_peaks_are_within_their_bounds(
    schedule: Schedule, costs: tuple[float, float, float, float]
) -> None:
    found = simulate(schedule, Costs(*costs))
    micro_batches, per_rank = schedule.num_micro_batches, schedule.num_stages // schedule.num_ranks
    assert -1e-9 <= found.bubble <= 1
    if found.cost:
        work = micro_batches * per_rank * sum(costs[:3])
        assert found.bubble == pytest.approx(1 - work / found.cost, abs=1e-9)
    assert all(1 <= peak <= micro_batches * per_rank for peak in found.peak_activations)


def test_a_deadlock_is_reported() -> None:
    with pytest.raises(DeadlockError, match="rank 0 waits at 0B0 for 1B0 of rank 1"):
        simulate(parse_schedule("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1"), Costs(1, 1))


@pytest.mark.parametrize(
    ("costs", "problem"),
    [
        (Costs((1, 2, 3), 1), "forward costs of 3 stages given, expected 2"),
        (Costs(1, 1, communication=-1), "communication cost must not be negative, found -1"),
        (Costs(1, 1, retained=1.5), "retained must be from 0 to 1, found 1.5"),
    ],
)
def test_costs_that_do_not_fit_are_refused(costs: Costs, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        simulate(gpipe(2, 1), costs)
