import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import ConfigError
from megatron.optimizer.lr_schedule import LearningRateSchedule, build_schedule
from tests.optimizer.support import make_config

STYLES = ["constant", "linear", "cosine"]
LINEAR = LearningRateSchedule(peak=1.0, floor=0.1, style="linear", warmup=10, decay=110)

schedules = st.builds(
    lambda peak, floor, style, warmup, length: LearningRateSchedule(
        peak=peak, floor=floor * peak, style=style, warmup=warmup, decay=warmup + length
    ),
    st.floats(1e-6, 10.0),
    st.floats(0.0, 1.0),
    st.sampled_from(STYLES),
    st.integers(0, 1000),
    st.integers(1, 10_000),
)


def schedule_of(batch: int = 4, **changes: Any) -> LearningRateSchedule:
    """The schedule of the test configuration; train_* go to the train section."""
    train = {key: changes.pop(key) for key in list(changes) if key.startswith("train_")}
    config = make_config(**{"lr": 1.0, **changes})
    return build_schedule(replace(config, train=replace(config.train, **train)), batch)


@pytest.mark.parametrize(
    ("style", "samples", "rate"),
    [
        ("linear", 0, 0.0),
        ("linear", 5, 0.5),
        ("linear", 10, 1.0),
        ("linear", 60, 0.55),
        ("linear", 110, 0.1),
        ("linear", 500, 0.1),
        ("cosine", 35, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),
        ("cosine", 60, 0.55),
        ("cosine", 110, 0.1),
        ("constant", 5, 0.5),
        ("constant", 10, 1.0),
        ("constant", 500, 1.0),
    ],
)
def test_known_rates(style: str, samples: int, rate: float) -> None:
    assert replace(LINEAR, style=style).rate(samples) == pytest.approx(rate, rel=1e-12)


@given(schedules, st.integers(0, 12_000))
def test_rises_to_the_peak_then_never_rises(schedule: LearningRateSchedule, samples: int) -> None:
    now, later = schedule.rate(samples), schedule.rate(samples + 1)
    if samples < schedule.warmup:
        assert 0 <= now < later <= schedule.peak
    else:
        assert schedule.floor * (1 - 1e-12) <= later <= now * (1 + 1e-12)
        assert now <= schedule.peak * (1 + 1e-12)


@given(schedules)
def test_reaches_both_ends_exactly(schedule: LearningRateSchedule) -> None:
    assert schedule.rate(schedule.warmup) == pytest.approx(schedule.peak, rel=1e-12)
    end = schedule.peak if schedule.style == "constant" else schedule.floor
    assert schedule.rate(schedule.decay) == end


def test_iterations_and_samples_state_the_same_schedule() -> None:
    by_iterations = schedule_of(train_iters=100, lr_warmup_iters=7, lr_decay_iters=80)
    by_samples = schedule_of(
        train_iters=None, train_samples=400, lr_warmup_samples=28, lr_decay_samples=320
    )
    assert by_iterations == by_samples
    assert (by_samples.warmup, by_samples.decay) == (28, 320)


def test_decay_lasts_as_long_as_the_run_by_default() -> None:
    assert schedule_of(train_iters=25).decay == 100
    assert schedule_of(train_iters=None, train_samples=70).decay == 70


def test_warmup_fraction_is_of_the_decay() -> None:
    schedule = schedule_of(train_iters=100, lr_decay_iters=50, lr_warmup_fraction=0.1)
    assert schedule.warmup == 20


def test_warmup_longer_than_decay_is_refused() -> None:
    with pytest.raises(ConfigError, match="--lr-warmup-iters"):
        schedule_of(train_iters=5, lr_warmup_iters=6)


def test_resuming_needs_the_same_schedule() -> None:
    saved = LINEAR.state_dict()
    assert LINEAR.resumed(saved, override=False, use_checkpoint=False) == LINEAR
    other = replace(LINEAR, peak=2.0, decay=200)
    with pytest.raises(ConfigError) as caught:
        other.resumed(saved, override=False, use_checkpoint=False)
    assert len(caught.value.problems) == 2
    assert "--lr: the checkpoint has 1.0, the flags give 2.0" in caught.value.problems[0]
    assert "--lr-decay-iters" in caught.value.problems[1]


def test_resuming_can_follow_either_side() -> None:
    saved, other = LINEAR.state_dict(), replace(LINEAR, peak=2.0)
    assert other.resumed(saved, override=True, use_checkpoint=False) == other
    assert other.resumed(saved, override=False, use_checkpoint=True) == LINEAR
