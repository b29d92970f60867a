"""The planner beside published runs: what they are, and what published systems did otherwise."""

from dataclasses import replace

import pytest

from benchmarks.planner_validation import (
    accumulating_apart,
    as_published,
    awaiting_tensor_ranks,
    counted_flops,
    decomposing_products,
    predict,
    report,
    scattering_messages,
)
from benchmarks.published_runs import CORE, KORTHIKANTI, NARAYANAN, Run, System, published_runs
from megatron.config import Config
from megatron.planner.dry_run import Recorded, record
from megatron.planner.hardware import load_hardware
from megatron.planner.trace import Communication, Operation, Trace, Wait
from megatron.training import GPTPretraining
from megatron.validation import validate
from tests.configs import small

RUNS = list(published_runs())
A100 = load_hardware("a100-80gb")


def product(m: int, n: int, k: int) -> Operation:
    return Operation(
        "aten.mm", "matmul", 2.0 * m * n * k, 2 * (m * k + k * n + m * n), (1, m, n, k)
    )


def collective(kind: str, size: int, number: int, group: str = "tensor") -> Communication:
    return Communication(kind, group, (0, 1, 2, 3), size, number)


def test_all_published_runs_are_valid_configurations() -> None:
    tables = [run.table for run in RUNS]
    assert [tables.count(table) for table in (NARAYANAN, KORTHIKANTI, CORE)] == [10, 8, 9]
    assert not [problem for run in RUNS for problem in validate(run.config, run.gpus)]


@pytest.mark.parametrize(
    ("name", "billions"), [("1008B", 1008), ("145.6B", 145.6), ("529.6B", 529.6), ("459B", 459)]
)
def test_their_models_have_the_published_sizes(name: str, billions: float) -> None:
    model = next(run.config.model for run in RUNS if run.name == name)
    h, layers, vocabulary = model.hidden_size, model.num_layers, model.vocab_size
    assert vocabulary is not None
    found = 12 * layers * h * h * (1 + 13 / (12 * h)) + vocabulary * h
    assert found / 1e9 == pytest.approx(billions, rel=0.02)


def test_operations_are_counted_as_the_publications_do() -> None:
    """The time that arXiv 2104.04473 predicts is 8 T P / n X for 300 B tokens (equation 4)."""
    run = next(run for run in RUNS if run.name == "1008B")
    assert run.config.train.global_batch_size is not None
    tokens = run.config.train.global_batch_size * 2048
    assert counted_flops(run) / tokens == pytest.approx(8 * 1008e9, rel=0.03)
    repeated = replace(run, config=RUNS[0].config)
    once = replace(
        repeated,
        config=replace(
            repeated.config, parallel=replace(repeated.config.parallel, recompute_granularity=None)
        ),
    )
    assert counted_flops(repeated) / counted_flops(once) == pytest.approx(4 / 3, rel=0.05)


def test_waiting_for_tensor_ranks() -> None:
    far = collective("all-reduce", 8, 2, group="data")
    trace: Trace = (collective("all-reduce", 8, 1), far, product(8, 8, 8), Wait(1), Wait(2))
    expected = (collective("all-reduce", 8, 1), Wait(1), far, product(8, 8, 8), Wait(2))
    assert awaiting_tensor_ranks(trace) == expected


def test_sums_of_gradients_in_a_pass_of_their_own() -> None:
    forward, gradient = product(64, 16, 32), product(16, 32, 64)
    found = accumulating_apart((forward, gradient), tokens=64)
    assert found[:2] == (forward, gradient)
    assert [(o.kind, o.bytes) for o in found[2:] if isinstance(o, Operation)] == [
        ("memory", 10 * 16 * 32)
    ]


def test_messages_in_shares() -> None:
    sent, other = collective("send", 64, 1, group="pipeline"), collective("all-reduce", 64, 2)
    assert scattering_messages((sent, other), ranks=4) == (replace(sent, bytes=16), other)


def test_collectives_beside_pieces_of_products() -> None:
    gather, scatter = collective("all-gather", 64, 1), collective("reduce-scatter", 64, 2)
    trace: Trace = (gather, Wait(1), product(8, 4, 2), product(8, 2, 4), scatter, Wait(2))
    piece = replace(product(2, 4, 2), flops=product(8, 4, 2).flops / 4)
    last = replace(product(2, 2, 4), flops=product(8, 2, 4).flops / 4)
    assert decomposing_products(trace, pieces=4) == (
        *(replace(gather, bytes=16), replace(gather, bytes=48, number=-1), Wait(1)),
        *(*[piece] * 4, Wait(-1)),
        *(replace(scatter, bytes=48, number=-2), *[last] * 4, Wait(-2)),
        *(replace(scatter, bytes=16), Wait(2)),
    )


def test_what_already_runs_beside_a_product_and_what_no_product_is_near_stay() -> None:
    beside: Trace = (collective("all-gather", 64, 1), product(8, 4, 2), Wait(1))
    alone: Trace = (collective("reduce-scatter", 64, 1), Wait(1), product(8, 4, 2))
    assert decomposing_products(beside, pieces=4) == beside
    assert decomposing_products(alone, pieces=4) == alone


@pytest.fixture(scope="module")
def recorded() -> tuple[Config, Recorded]:
    config = small(
        model_type="gpt",
        fp16=True,
        num_layers=2,
        vocab_size=512,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        micro_batch_size=1,
        global_batch_size=8,
    )
    return config, record(config, GPTPretraining, 8)


@pytest.mark.parametrize(
    "system",
    [
        System(waits_for_tensor_ranks=True),
        System(accumulates_apart=True),
        System(sums_behind_pipeline=True),
    ],
)
def test_every_lack_of_a_system_costs_time(
    recorded: tuple[Config, Recorded], system: System
) -> None:
    config, seen = recorded
    run = Run(NARAYANAN, "tiny", 1.0, 8, "a100-80gb", system, config)
    # Nothing here lasts as long as the host needs to issue it.
    hardware = replace(A100, issue_us=0.001)
    as_ours = predict(run, as_published(seen, System()), hardware).seconds
    assert predict(run, as_published(seen, system), hardware).seconds > as_ours


def test_the_report_says_what_is_missed(
    recorded: tuple[Config, Recorded], capsys: pytest.CaptureFixture[str]
) -> None:
    config, seen = recorded
    run = Run(KORTHIKANTI, "tiny", 1.0, 8, "a100-80gb", System(), config)
    found = predict(run, as_published(seen, System()), A100)
    (figures,) = report([found])
    assert figures["worst"] == abs(found.seconds - 1.0)
    assert "goal 15%): missed" in capsys.readouterr().out
    report([replace(found, run=replace(run, published=found.seconds))])
    assert "goal 15%): met" in capsys.readouterr().out
