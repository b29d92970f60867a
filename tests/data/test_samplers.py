"""Properties of how samples are dealt out to micro-batches and ranks."""

from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.samplers import MicroBatchSampler
from tests.data.support import EXAMPLES


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, int]:
    micro, data, steps = (draw(st.integers(1, 4)) for _ in range(3))
    return {
        "micro_batch_size": micro,
        "data_size": data,
        "global_batch_size": micro * data * steps,
    }


def flat(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def batches(samples: int, layout: dict[str, int], **changes: Any) -> list[list[int]]:
    """The first 40 global batches, each as the ranks together see it."""
    arguments = {"consumed_samples": 0, "cyclic": False, "seed": 7, **layout, **changes}
    per_rank = layout["global_batch_size"] // layout["data_size"] // layout["micro_batch_size"]
    shares = []
    for rank in range(layout["data_size"]):
        sampler = MicroBatchSampler(samples, data_rank=rank, **arguments)
        micro = list(islice(sampler, 40 * per_rank))
        assert all(len(batch) == layout["micro_batch_size"] for batch in micro)
        assert len(micro) % per_rank == 0
        shares.append([flat(micro[i : i + per_rank]) for i in range(0, len(micro), per_rank)])
    return [flat(parts) for parts in zip(*shares, strict=True)]


@given(layout=layouts(), samples=st.integers(1, 300))
@EXAMPLES
def test_global_batches_hold_consecutive_samples(layout: dict[str, int], samples: int) -> None:
    size = layout["global_batch_size"]
    whole = [list(range(i, i + size)) for i in range(0, samples - size + 1, size)]
    assert batches(samples, layout) == whole[:40]


@given(layout=layouts(), samples=st.integers(1, 100), consumed=st.integers(0, 200))
@EXAMPLES
def test_a_cycle_is_a_permutation_for_each_epoch(
    layout: dict[str, int], samples: int, consumed: int
) -> None:
    order = flat(batches(samples, layout, cyclic=True))
    for start in range(0, len(order) - samples + 1, samples):
        assert sorted(order[start : start + samples]) == list(range(samples))
    resumed = flat(batches(samples, layout, cyclic=True, consumed_samples=consumed))
    common = min(len(order) - consumed, len(resumed))
    assert common <= 0 or order[consumed : consumed + common] == resumed[:common]


@given(layout=layouts(), samples=st.integers(1, 300), step=st.integers(0, 10))
@EXAMPLES
def test_resuming_goes_on_where_the_run_was(
    layout: dict[str, int], samples: int, step: int
) -> None:
    whole = batches(samples, layout)
    consumed = step * layout["global_batch_size"]
    resumed = batches(samples, layout, consumed_samples=consumed)
    assert resumed[: len(whole[step:])] == whole[step:]


@st.composite
def ramps(draw: st.DrawFn) -> tuple[int, int, Callable[[int], int]]:
    """Micro-batch, data-parallel size, and a global batch that grows with what is consumed."""
    micro, data = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    every, first, most = draw(st.integers(1, 40)), draw(st.integers(1, 3)), draw(st.integers(3, 6))
    return micro, data, lambda consumed: micro * data * min(most, first + consumed // every)


@given(ramp=ramps(), samples=st.integers(1, 300), cyclic=st.booleans(), step=st.integers(0, 12))
@EXAMPLES
def test_a_growing_batch_keeps_the_order(
    ramp: tuple[int, int, Callable[[int], int]], samples: int, cyclic: bool, step: int
) -> None:
    micro, data, batch_at = ramp
    starts = [0]  # of the global batches
    end = 300 if cyclic else samples
    while starts[-1] + batch_at(starts[-1]) <= end:
        starts.append(starts[-1] + batch_at(starts[-1]))
    step = min(step, len(starts) - 1)
    kept = (starts[-1] - starts[step]) // micro // data
    shares = []
    for rank in range(data):
        arguments = {"micro_batch_size": micro, "cyclic": cyclic, "seed": 7}
        sampler = MicroBatchSampler(
            samples,
            consumed_samples=starts[step],
            data_rank=rank,
            data_size=data,
            global_batch_size=batch_at,
            **arguments,
        )
        micro_batches = list(islice(sampler, kept + (0 if cyclic else 100)))
        assert len(micro_batches) == kept
        shares.append(iter(flat(micro_batches)))
    order: list[int] = []
    for start in starts[step:-1]:
        for share in shares:
            order += islice(share, batch_at(start) // data)
    one = {"micro_batch_size": 1, "data_size": 1, "data_rank": 0, "global_batch_size": 1}
    constant = MicroBatchSampler(samples, consumed_samples=0, cyclic=cyclic, seed=7, **one)
    assert order == flat(islice(constant, starts[-1]))[starts[step] :]


def test_a_step_of_a_growing_batch_that_cannot_be_shared_out_is_refused() -> None:
    layout = {"micro_batch_size": 2, "data_size": 1, "global_batch_size": lambda n: 2 + n // 4}
    sampler = MicroBatchSampler(50, data_rank=0, consumed_samples=0, cyclic=False, seed=1, **layout)
    with pytest.raises(
        ValueError, match=r"--global-batch-size 3 at 4 consumed samples is not divisible"
    ):
        list(sampler)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    layout = {"micro_batch_size": 50, "data_size": 1, "global_batch_size": 50}
    first, second, *_ = batches(50, layout, cyclic=True)
    other = batches(50, layout, cyclic=True, seed=8)[0]
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(50))}) == 4


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--global-batch-size 10 .* 2 times .* size 3"):
        batches(20, {"micro_batch_size": 2, "data_size": 3, "global_batch_size": 10})


def test_no_samples_are_refused() -> None:
    layout = {"micro_batch_size": 1, "data_size": 1, "global_batch_size": 1}
    with pytest.raises(ValueError, match="no samples"):
        batches(0, layout)
