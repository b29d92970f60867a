"""Every schedule holds what it promises for any numbers of ranks, chunks and micro-batches."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.pipeline.actions import Action, Kind, Schedule, parse_schedule, validate
from megatron.pipeline.messages import check_order
from megatron.pipeline.schedule import SCHEDULES, gpipe, make_schedule, one_f_one_b
from megatron.pipeline.simulator import Costs, simulate

RANKS = st.integers(1, 8)
MICRO_BATCHES = st.integers(1, 24)
COSTS = st.one_of(
    st.none(),
    st.builds(
        Costs,
        st.floats(0.1, 10),
        st.floats(0.1, 10),
        st.floats(0, 10),
        st.one_of(st.just(0.0), st.floats(0, 3)),
        st.floats(0, 1),
    ),
)


def many(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True)


def check_table(schedule: Schedule, ranks: int, virtual: int, micro_batches: int) -> None:
    """Complete, free of deadlock, in one order on all ranks, and ascending on every stage."""
    validate(schedule)
    check_order(schedule)
    assert schedule.placement == tuple(range(ranks)) * virtual
    assert schedule.num_micro_batches == micro_batches
    for table in schedule.ranks:
        passed: dict[tuple[int, Kind], list[int]] = {}
        done: set[Action] = set()
        for action in table:
            passed.setdefault((action.stage, action.kind), []).append(action.micro_batch)
            if action.kind is Kind.WEIGHT:
                assert action._replace(kind=Kind.BACKWARD) in done
            done.add(action)
        assert all(order == list(range(micro_batches)) for order in passed.values())


@many(1000)
@given(st.sampled_from(("gpipe", "1f1b")), RANKS, MICRO_BATCHES, COSTS)
def test_gpipe_and_1f1b(name: str, ranks: int, micro_batches: int, costs: Costs | None) -> None:
    schedule = make_schedule(name, ranks, micro_batches, costs=costs)
    check_table(schedule, ranks, 1, micro_batches)
    assert all(len(table) == 2 * micro_batches for table in schedule.ranks)
    assert parse_schedule(str(schedule)) == schedule
    found = simulate(schedule, Costs(1, 2, 3))
    assert found.bubble == pytest.approx((ranks - 1) / (micro_batches + ranks - 1), abs=1e-9)
    held = {
        "gpipe": (micro_batches,) * ranks,
        "1f1b": tuple(min(ranks - rank, micro_batches) for rank in range(ranks)),
    }
    assert found.peak_activations == held[name]


@many(700)
@given(RANKS, st.integers(1, 4), MICRO_BATCHES)
def test_interleaved(ranks: int, virtual: int, micro_batches: int) -> None:
    schedule = make_schedule("interleaved", ranks, micro_batches, virtual=virtual)
    check_table(schedule, ranks, virtual, micro_batches)
    found = simulate(schedule, Costs(1, 1, 1))
    bound = min(ranks * virtual + ranks - 1, micro_batches * virtual)
    assert max(found.peak_activations) <= bound
    if micro_batches % ranks == 0:
        assert found.cost == pytest.approx(3 * (micro_batches * virtual + ranks - 1))
        for rank, peak in enumerate(found.peak_activations):
            assert peak <= 2 * (ranks - rank - 1) + (virtual - 1) * ranks + 1
    full = make_schedule(
        "interleaved", ranks, micro_batches + -micro_batches % ranks, virtual=virtual
    )
    assert found.cost <= simulate(full, Costs(1, 1, 1)).cost


@pytest.mark.parametrize(
    ("ranks", "virtual", "micro_batches"),
    [(4, 2, 5), (4, 2, 7), (4, 3, 9), (8, 2, 12), (8, 4, 9), (8, 3, 27)],
)
def test_a_surplus_of_micro_batches_costs_no_more_than_its_work(
    ranks: int, virtual: int, micro_batches: int
) -> None:
    schedule = make_schedule("interleaved", ranks, micro_batches, virtual=virtual)
    found = simulate(schedule, Costs(1, 1, 1))
    assert found.cost == pytest.approx(3 * (micro_batches * virtual + ranks - 1))


@many(250)
@given(RANKS, st.integers(1, 3), MICRO_BATCHES, COSTS)
def test_interleaved_fitted_to_costs(
    ranks: int, virtual: int, micro_batches: int, costs: Costs | None
) -> None:
    schedule = make_schedule("interleaved", ranks, micro_batches, virtual=virtual, costs=costs)
    check_table(schedule, ranks, virtual, micro_batches)
    costs = costs or Costs(1, 1, 1)
    found = simulate(schedule, costs)
    assert max(found.peak_activations) <= min(ranks * virtual + ranks - 1, micro_batches * virtual)
    free = make_schedule("interleaved", ranks, micro_batches, virtual=virtual)
    assert micro_batches % ranks or found.cost <= simulate(free, costs).cost * (1 + 1e-9)


@many(700)
@given(RANKS, MICRO_BATCHES)
def test_zb_h1(ranks: int, micro_batches: int) -> None:
    schedule = make_schedule("zb-h1", ranks, micro_batches)
    check_table(schedule, ranks, 1, micro_batches)
    found = simulate(schedule, Costs(1, 1, 1))
    assert max(found.peak_activations) <= min(ranks, micro_batches)
    plain = simulate(one_f_one_b(ranks, micro_batches), Costs(1, 1, 1))
    assert found.cost <= plain.cost
    if micro_batches >= 2 * ranks:  # arXiv 2401.10241, Table 2: (p - 1) (F + B - W)
        assert found.cost == pytest.approx(3 * micro_batches + ranks - 1)


@many(200)
@given(
    st.sampled_from(("zb-h1", "zb-2p")),
    st.integers(1, 8),
    st.one_of(st.integers(1, 4), st.integers(1, 20)),
    COSTS,
)
def test_zero_bubble_fitted_to_costs(
    name: str, ranks: int, micro_batches: int, costs: Costs | None
) -> None:
    schedule = make_schedule(name, ranks, micro_batches, costs=costs)
    check_table(schedule, ranks, 1, micro_batches)
    assert all(len(table) == 3 * micro_batches for table in schedule.ranks)
    costs = costs or Costs(1, 1, 1)
    found = simulate(schedule, costs)
    bound = ranks if name == "zb-h1" else 2 * ranks
    assert max(found.peak_activations) <= bound + 1e-9
    handmade = make_schedule("zb-h1", ranks, micro_batches)
    assert found.cost <= simulate(handmade, costs).cost * (1 + 1e-9)


def test_a_slow_stage_is_taken_into_account() -> None:
    costs = Costs((1, 1, 3, 1), (1, 1, 3, 1), (1, 1, 3, 1))
    found = simulate(make_schedule("zb-2p", 4, 16, costs=costs), costs)
    assert found.cost == pytest.approx(16 * 9, rel=0.01)  # the slow rank is never idle


def test_enough_memory_and_equal_costs_leave_no_bubble() -> None:
    """ZB-H2 of the paper: 2p - 1 forward passes held."""
    for ranks in (2, 4, 8):
        schedule = make_schedule("zb-2p", ranks, 4 * ranks)
        assert simulate(schedule, Costs(1, 1, 1)).bubble == pytest.approx(0, abs=1e-9)


def test_the_tables_of_two_ranks() -> None:
    assert str(gpipe(2, 2)) == "0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1"
    assert str(one_f_one_b(2, 3)) == "0F0 0F1 0B0 0F2 0B1 0B2\n1F0 1B0 1F1 1B1 1F2 1B2"
    assert str(make_schedule("zb-h1", 2, 3)) == (
        "0F0 0F1 0B0 0W0 0F2 0B1 0W1 0B2 0W2\n1F0 1B0 1F1 1B1 1W0 1F2 1B2 1W1 1W2"
    )
    assert str(make_schedule("interleaved", 2, 2, virtual=2)) == (
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1\n1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1"
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_same_arguments_give_the_same_table(name: str) -> None:
    """In every process: ranks make their tables one by one."""
    code = (
        "from megatron.pipeline.schedule import make_schedule\n"
        "from megatron.pipeline.simulator import Costs\n"
        f"print(make_schedule({name!r}, 4, 7, costs=Costs(1, 1.1, 0.6, 0.1, 0.5)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    here = make_schedule(name, 4, 7, costs=Costs(1, 1.1, 0.6, 0.1, 0.5))
    assert printed.stdout.decode().strip() == str(here)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="--pipeline-schedule 2f2b is none of gpipe, 1f1b"):
        make_schedule("2f2b", 2, 2)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (-1, 2, 1), (1, 1, 0)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_to_do_is_refused(name: str, sizes: tuple[int, int, int]) -> None:
    ranks, micro_batches, virtual = sizes
    with pytest.raises(ValueError, match="a pipeline needs stages and micro-batches"):
        make_schedule(name, ranks, micro_batches, virtual=virtual)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "interleaved"])
def test_several_chunks_are_for_the_interleaved_schedule(name: str) -> None:
    with pytest.raises(ValueError, match=f"--pipeline-schedule {name} has one chunk per rank"):
        make_schedule(name, 2, 2, virtual=2)
