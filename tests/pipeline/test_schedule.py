"""GPipe and 1F1B hold what they promise for every number of stages and micro-batches."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.pipeline.actions import parse_schedule, validate
from megatron.pipeline.messages import check_order
from megatron.pipeline.schedule import SCHEDULES, gpipe, make_schedule, one_f_one_b
from megatron.pipeline.simulator import Costs, simulate

THOUSAND = settings(max_examples=1000, deadline=None, derandomize=True)
NAMES = st.sampled_from(sorted(SCHEDULES))
STAGES = st.integers(1, 12)
MICRO_BATCHES = st.integers(1, 30)


@THOUSAND
@given(NAMES, STAGES, MICRO_BATCHES)
def test_every_schedule_is_valid(name: str, stages: int, micro_batches: int) -> None:
    schedule = make_schedule(name, stages, micro_batches)
    validate(schedule)
    check_order(schedule)
    assert schedule.placement == tuple(range(stages))
    assert schedule.num_micro_batches == micro_batches
    assert all(len(table) == 2 * micro_batches for table in schedule.ranks)
    assert parse_schedule(str(schedule)) == schedule


@THOUSAND
@given(
    NAMES,
    STAGES,
    MICRO_BATCHES,
    st.floats(0.1, 10),
    st.floats(0.1, 10),
    st.floats(0, 10),
)
def test_bubble_and_peak_are_as_published(
    name: str, stages: int, micro_batches: int, forward: float, backward: float, weight: float
) -> None:
    schedule = make_schedule(name, stages, micro_batches)
    found = simulate(schedule, Costs(forward, backward, weight))
    assert found.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1), abs=1e-9)
    held = {
        "gpipe": (micro_batches,) * stages,
        "1f1b": tuple(min(stages - stage, micro_batches) for stage in range(stages)),
    }
    assert found.peak_activations == held[name]


def test_the_tables_of_two_stages() -> None:
    assert str(gpipe(2, 2)) == "0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1"
    assert str(one_f_one_b(2, 3)) == "0F0 0F1 0B0 0F2 0B1 0B2\n1F0 1B0 1F1 1B1 1F2 1B2"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="--pipeline-schedule 2f2b is none of gpipe, 1f1b"):
        make_schedule("2f2b", 2, 2)


@pytest.mark.parametrize(("stages", "micro_batches"), [(0, 1), (1, 0), (-1, 2)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_to_do_is_refused(name: str, stages: int, micro_batches: int) -> None:
    with pytest.raises(ValueError, match="a pipeline needs stages and micro-batches"):
        make_schedule(name, stages, micro_batches)
