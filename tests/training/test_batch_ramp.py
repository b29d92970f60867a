"""The global batch grows as --rampup-batch-size says."""

from hypothesis import given
from hypothesis import strategies as st

from megatron.config import TrainConfig
from megatron.training.batch_ramp import BatchRamp


@st.composite
def ramps(draw: st.DrawFn) -> BatchRamp:
    start, increment = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    full = start + increment * draw(st.integers(0, 12))
    return BatchRamp(start, increment, draw(st.integers(1, 500)), full)


def test_without_the_flag_every_step_is_whole() -> None:
    ramp = BatchRamp.of(TrainConfig(micro_batch_size=2, train_iters=1), data_parallel_size=3)
    assert [ramp.at(samples) for samples in (0, 1, 1000)] == [6, 6, 6]
    assert ramp.steps(0, 35) == 5


def test_the_example_of_the_module() -> None:
    train = TrainConfig(micro_batch_size=2, global_batch_size=8, rampup_batch_size=(4, 2, 30))
    ramp = BatchRamp.of(train, data_parallel_size=1)
    sizes = [ramp.at(samples) for samples in (0, 14, 15, 29, 30, 31)]
    assert sizes == [4, 4, 6, 6, 8, 8]


@given(ramps())
def test_the_parts_of_a_ramp_are_equal_and_each_is_one_increment(ramp: BatchRamp) -> None:
    parts = (ramp.full - ramp.start) // ramp.increment
    assert ramp.at(0) == ramp.start
    assert ramp.at(ramp.ramp) == ramp.full
    for part in range(parts):
        first = -(-part * ramp.ramp // parts)  # the first sample of a part, rounded up
        last = -(-(part + 1) * ramp.ramp // parts) - 1
        for samples in (first, last) if first <= last else ():
            assert ramp.at(samples) == ramp.start + part * ramp.increment


@given(ramps(), st.integers(0, 2000), st.integers(0, 2000))
def test_steps_are_those_that_fit_and_add_up_from_wherever_a_run_goes_on(
    ramp: BatchRamp, last: int, done: int
) -> None:
    consumed, sizes = 0, []
    while consumed + ramp.at(consumed) <= last:
        sizes.append(ramp.at(consumed))
        consumed += sizes[-1]
    assert ramp.steps(0, last) == len(sizes)
    assert sizes == sorted(sizes)
    first = sum(sizes[: min(done, len(sizes))])
    assert ramp.steps(first, last) == len(sizes) - min(done, len(sizes))
