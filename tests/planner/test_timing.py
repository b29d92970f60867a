"""The times of operators, of communications, of traces and of a step."""

from dataclasses import replace

import pytest

from megatron.pipeline.actions import Kind
from megatron.pipeline.schedule import make_schedule
from megatron.planner.hardware import Hardware, load_hardware
from megatron.planner.timing import (
    Clock,
    RankTraces,
    communication_seconds,
    operation_seconds,
    step_time,
)
from megatron.planner.trace import Communication, Operation, Trace, Wait

A100 = load_hardware("a100-80gb")
# Nothing but what the tests below add up.
PLAIN = replace(A100, launch_us=0.0, issue_us=0.0, communication_processors=0)
FREE = replace(
    PLAIN,
    nvlink=replace(PLAIN.nvlink, latency_us=0.0, start_us=0.0),
    network=replace(PLAIN.network, latency_us=0.0, start_us=0.0),
)
NODE, PAIR, TWO_NODES = tuple(range(8)), (0, 1), tuple(range(16))


def product(m: int, n: int, k: int, batch: int = 1, dtype: str = "bfloat16") -> Operation:
    moved = 2 * batch * (m * k + k * n + m * n)
    return Operation("aten.mm", "matmul", 2.0 * batch * m * n * k, moved, (batch, m, n, k), dtype)


def attention(s: int, name: str = "attention", causal: bool = False) -> Operation:
    products = 5 if "backward" in name else 2
    flops = 2.0 * products * 64 * s * s * 128
    return Operation(name, "attention", flops, 1, (64, s, s, 128), "bfloat16", causal)


def share(operation: Operation, hardware: Hardware = PLAIN) -> float:
    """Of the peak rate."""
    seconds = operation_seconds(operation, hardware)
    return operation.flops / seconds / hardware.peak_flops(operation.dtype)


def reading(seconds: float) -> Operation:
    """An operator of so many seconds."""
    moved = seconds * PLAIN.bandwidth_gb * 1e9 * PLAIN.bandwidth_reached
    return Operation("aten.add", "memory", 0.0, round(moved))


def sending(
    seconds: float, number: int, ranks: tuple[int, ...] = NODE, group: str = "tensor"
) -> Communication:
    """An all-reduce of so many seconds."""
    one = Communication("all-reduce", group, ranks, 10**9, number)
    return replace(one, bytes=round(seconds / communication_seconds(one, FREE) * 1e9))


def lasting(trace: Trace, hardware: Hardware = FREE) -> float:
    clock = Clock(hardware)
    clock.run(trace)
    return clock.now


def test_a_large_product_reaches_the_stated_share_and_none_more() -> None:
    shares = [share(product(m, m, m)) for m in (256, 512, 1024, 2048, 4096, 8192, 16384)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(A100.matmul.reached, rel=0.05)
    assert max(shares) <= A100.matmul.reached


def test_a_product_pays_for_small_k_and_for_the_last_wave() -> None:
    assert share(product(8192, 8192, 64)) < 0.5 * share(product(8192, 8192, 4096))
    # 108 tiles of 256 x 128 are one wave, one tile more begins another one.
    full, more = product(256 * 12, 128 * 9, 4096), product(256 * 12, 128 * 9 + 1, 4096)
    assert operation_seconds(more, PLAIN) > 1.05 * operation_seconds(full, PLAIN)


def test_a_long_sum_of_few_results_is_shared_among_the_processors() -> None:
    four_smallest_tiles = product(128, 128, 65536)
    assert share(four_smallest_tiles) > 2 * 4 / PLAIN.processors * PLAIN.matmul.reached


def test_a_product_of_a_vector_is_bound_by_the_memory() -> None:
    operation = product(1, 8192, 8192)
    reached = operation.bytes / operation_seconds(operation, PLAIN) / 1e9
    assert reached == pytest.approx(A100.bandwidth_gb * A100.bandwidth_reached)


def test_a_number_format_has_its_rate() -> None:
    half, single = product(4096, 4096, 4096), product(4096, 4096, 4096, dtype="float32")
    ratio = operation_seconds(single, PLAIN) / operation_seconds(half, PLAIN)
    assert ratio == pytest.approx(A100.peak_flops("bfloat16") / A100.peak_flops("float32"))


def test_attention_by_direction_length_and_mask() -> None:
    long = attention(32768)
    assert share(long) == pytest.approx(A100.attention.forward, rel=0.02)
    assert share(attention(32768, "attention_backward")) < share(long)
    assert share(attention(512)) < share(attention(2048)) < share(long)
    causal = operation_seconds(attention(4096, causal=True), PLAIN)
    assert causal == pytest.approx(operation_seconds(attention(4096), PLAIN) / 2)


def test_every_operator_costs_its_launch() -> None:
    tiny = Operation("aten.add", "memory", 0.0, 8)
    assert operation_seconds(tiny, replace(PLAIN, launch_us=3.0)) == pytest.approx(3e-6, rel=1e-3)


def test_the_host_may_be_what_an_action_waits_for() -> None:
    slow = replace(PLAIN, issue_us=10.0)
    tiny = Operation("aten.add", "memory", 0.0, 8)
    assert lasting((tiny,) * 100, slow) == pytest.approx(1e-3)
    assert lasting((reading(0.1), *(tiny,) * 100), slow) == pytest.approx(0.1, rel=1e-3)


def test_collectives_of_a_ring() -> None:
    def seconds(kind: str, ranks: tuple[int, ...], size: int = 10**9) -> float:
        return communication_seconds(Communication(kind, "tensor", ranks, size, 1), FREE)

    bandwidth, reached = A100.nvlink.bandwidth_gb, A100.nvlink.reached
    assert seconds("all-reduce", NODE) == pytest.approx(2 * 7 / 8 / bandwidth / reached.all_reduce)
    assert seconds("all-gather", PAIR) == pytest.approx(0.5 / bandwidth / reached.all_gather)
    assert seconds("send", PAIR) == pytest.approx(1 / bandwidth / reached.message)
    assert seconds("recv", PAIR) == seconds("send", PAIR)
    assert seconds("all-reduce", (3,)) == 0.0
    # One rank in each of two nodes has one adapter, eight of them have eight.
    wide, network = A100.network.bandwidth_gb, A100.network.reached.all_reduce
    assert seconds("all-reduce", (0, 8)) == pytest.approx(1 / wide / network)
    assert seconds("all-reduce", TWO_NODES) == pytest.approx(2 * 15 / 16 / wide / network / 8)


def test_a_small_collective_costs_its_latency() -> None:
    one = communication_seconds(Communication("all-reduce", "tensor", PAIR, 4, 1), A100)
    assert one > A100.nvlink.start_us * 1e-6
    far = communication_seconds(
        Communication("all-gather", "data", tuple(range(0, 512, 8)), 4, 1), A100
    )
    assert far > 63 * A100.network.latency_us * 1e-6


def test_a_communication_runs_beside_what_follows_until_it_is_waited_for() -> None:
    begun = sending(3.0, 1)
    assert lasting((begun, Wait(1), reading(2.0))) == pytest.approx(5.0)
    assert lasting((begun, reading(2.0), Wait(1))) == pytest.approx(3.0)
    assert lasting((begun, reading(4.0), Wait(1))) == pytest.approx(4.0)
    assert lasting((begun, reading(2.0))) == pytest.approx(2.0)


def test_one_group_takes_turns_and_groups_share_links() -> None:
    first, second = sending(1.0, 1), sending(2.0, 2)
    assert lasting((first, second, Wait(1))) == pytest.approx(1.0)
    assert lasting((first, second, Wait(2))) == pytest.approx(3.0)
    other = sending(2.0, 2, ranks=(0, 1, 2, 3), group="data")
    assert lasting((first, other, Wait(1))) == pytest.approx(2.0)
    assert lasting((first, other, Wait(2))) == pytest.approx(3.0)
    far = sending(2.0, 2, ranks=(0, 8), group="data")
    assert lasting((first, far, Wait(1))) == pytest.approx(1.0)
    assert lasting((first, far, Wait(2))) == pytest.approx(2.0)


def test_a_communication_takes_processors_from_what_runs_beside_it() -> None:
    hardware = replace(FREE, communication_processors=FREE.processors // 2)
    assert lasting((sending(1.0, 1), reading(2.0)), hardware) == pytest.approx(2.5)
    assert lasting((sending(9.0, 1), reading(2.0)), hardware) == pytest.approx(4.0)


def test_messages_of_the_pipeline_cost_an_action_nothing() -> None:
    message = Communication("send", "pipeline", (0, 8), 10**12, 1)
    assert lasting((message, reading(1.0), Wait(1))) == pytest.approx(1.0)


def test_communications_go_on_from_one_trace_to_the_next() -> None:
    clock = Clock(FREE)
    clock.run((sending(3.0, 1), reading(1.0)))
    clock.wait_until(2.0)
    clock.run((reading(0.5), Wait(1)))
    assert (clock.now, clock.waited) == (pytest.approx(3.0), pytest.approx(0.5))


def pipeline(
    ranks: int,
    *,
    last: Trace = (),
    first: Trace = (),
    before: Trace = (),
    after: Trace = (),
    message: int = 0,
) -> list[RankTraces]:
    """Forward passes of 1 s and backward passes of 2 s, and what comes on top."""
    found = []
    for rank in range(ranks):
        sent = (Communication("send", "pipeline", (8 * rank, 8 * rank + 8), message, 0),)
        actions = {
            (rank, Kind.FORWARD, "first"): (*first, reading(1.0), *sent),
            (rank, Kind.BACKWARD, "last"): (*last, reading(2.0)),
        }
        for place in ("first", "middle", "last"):
            actions.setdefault((rank, Kind.FORWARD, place), (reading(1.0), *sent))
            actions.setdefault((rank, Kind.BACKWARD, place), (reading(2.0),))
        found.append(RankTraces(actions, before, after))
    return found


def test_a_step_is_its_schedule_and_what_happens_once() -> None:
    schedule = make_schedule("1f1b", 4, 8)
    found = step_time(schedule, pipeline(4, before=(reading(0.5),), after=(reading(1.0),)), FREE)
    assert found.simulation.cost == pytest.approx((8 + 3) * 3)
    assert found.seconds == pytest.approx((8 + 3) * 3 + 1.5)
    assert (found.before, found.after) == (pytest.approx(0.5), pytest.approx(1.0))


def test_messages_lengthen_the_pipeline() -> None:
    schedule = make_schedule("gpipe", 2, 4)
    size = round(0.25 * A100.network.bandwidth_gb * 1e9 * A100.network.reached.message)
    found = step_time(schedule, pipeline(2, message=size), FREE)
    assert found.seconds == pytest.approx((4 + 1) * 3 + 2 * 0.25)


@pytest.mark.parametrize(("reduced", "exposed"), [(1.5, 0.0), (5.0, 3.0)])
def test_sums_of_gradients_run_beside_the_last_backward_pass(
    reduced: float, exposed: float
) -> None:
    sums = sending(reduced, 7, ranks=(0, 8), group="data")
    traces = pipeline(1, last=(sums,), after=(Wait(7), reading(1.0)))
    found = step_time(make_schedule("1f1b", 1, 4), traces, FREE)
    assert found.seconds == pytest.approx(4 * 3 + exposed + 1.0)


@pytest.mark.parametrize("carried", [5, 9])
def test_parameters_arrive_beside_what_comes_before_they_are_needed(carried: int) -> None:
    """Whether the step that was recorded counts from 1 or goes on with the one before it."""
    gather = sending(2.0, 9, ranks=(0, 8), group="data")
    message_of_the_step_before = Wait(3)
    before = (message_of_the_step_before, reading(0.5))
    traces = pipeline(1, before=before, first=(Wait(carried),), after=(gather,))
    found = step_time(make_schedule("1f1b", 1, 4), traces, FREE)
    assert found.seconds == pytest.approx(0.5 + 1.5 + 4 * 3)
    assert found.before == pytest.approx(2.0)


def test_stages_that_have_to_agree_wait_for_the_last_of_them() -> None:
    """Without it each goes on, and the next step begins as early as this one has ended."""
    agreed = Communication("all-reduce", "model", (0, 8), 0, 3)
    schedule = make_schedule("1f1b", 2, 4)
    together, apart = ((agreed, Wait(3), reading(1.0)), (reading(1.0),))
    late = pipeline(2, after=together)
    late[1] = replace(late[1], after=(reading(5.0), *together))
    assert step_time(schedule, late, FREE).seconds == pytest.approx(15 - 2 + 5 + 1)
    own = pipeline(2, after=apart)
    assert step_time(schedule, own, FREE).seconds == pytest.approx(15 + 1)
