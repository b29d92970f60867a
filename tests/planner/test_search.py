"""The search for layouts: it misses none, its estimates lead to the best, and it says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import pytest

from megatron.arguments import read_config
from megatron.config import Config
from megatron.errors import ConfigError
from megatron.planner.dry_run import dry_run, put_together
from megatron.planner.estimate import Estimator
from megatron.planner.hardware import GIB, Hardware, load_hardware
from megatron.planner.layouts import AXES, SCHEDULES, Layout, Layouts
from megatron.planner.parts import PartBook
from megatron.planner.reasons import reason, spent, summary
from megatron.planner.report import peak_bytes
from megatron.planner.search import Search, search
from megatron.training import BertPretraining, GPTPretraining, T5Pretraining
from megatron.training.task import Task
from megatron.validation import find_problems
from tests.configs import small

GPUS = 8
GPT: dict[str, Any] = {
    "model_type": "gpt", "num_layers": 4, "hidden_size": 4096, "num_attention_heads": 32,
    "seq_length": 2048, "max_position_embeddings": 2048, "vocab_size": 32000, "bf16": True,
    "global_batch_size": 32, "micro_batch_size": 1,
}  # fmt: skip
BERT = GPT | {"model_type": "bert", "seq_length": 512}
T5 = GPT | {
    "model_type": "t5", "seq_length": 512, "decoder_seq_length": 128, "vocab_extra_ids": 100,
    "position_embedding_type": "relative",
}  # fmt: skip
TASKS: dict[str, Callable[[Config], Task]] = {
    "bert": BertPretraining,
    "gpt": GPTPretraining,
    "t5": T5Pretraining,
}
# Few enough to run all of them dry.
FEW = {"recompute_granularity": None, "shard_gradients": False, "use_distributed_optimizer": True}


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return load_hardware("h100-sxm")


def _all_combinations(base: Config, gpus: int) -> Iterator[Layout]:
    """What there is of a small space, by asking the whole validation about every combination."""
    values = base.to_flags()
    for combination in product(
        range(1, gpus + 1), range(1, gpus + 1), (None, 1, 2, 3), SCHEDULES, (None, 1, 2, 3, 4),
        (True, False), (True, False), (False, True), (None, "selective", "full"), (1, 2, 4),
    ):  # fmt: skip
        layout = Layout(*combination)
        if _is_distinct(layout, base, gpus):
            problems = find_problems(values | asdict(layout), gpus)
            if not problems:
                yield layout


def _is_distinct(layout: Layout, base: Config, gpus: int) -> bool:
    """Whether no other combination means the same; it also keeps the number of questions small."""
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    has_split = base.model.model_type == "t5" and pipeline > 1
    is_virtual = layout.num_layers_per_virtual_pipeline_stage is not None
    return (
        tensor * pipeline <= gpus
        and (pipeline > 1 or layout.pipeline_schedule == "1f1b")
        and is_virtual == (layout.pipeline_schedule == "interleaved")
        and (layout.pipeline_model_parallel_split_rank is not None) == has_split
        and not (tensor == 1 and layout.sequence_parallel)
        and not (tensor * pipeline == gpus and layout.use_distributed_optimizer)
        and not (layout.shard_gradients and not layout.use_distributed_optimizer)
    )


@pytest.mark.parametrize("flags", [GPT, T5], ids=["gpt", "t5"])
def test_every_valid_layout_is_enumerated_once(flags: dict[str, Any]) -> None:
    base = small(**flags | {"global_batch_size": 4})
    found = list(Layouts(base, {}, 4))
    assert len(found) == len(set(found))
    assert set(found) == set(_all_combinations(base, 4))


def test_flags_of_a_run_rule_layouts_out() -> None:
    base = small(**GPT | {"cuda_graphs": True})
    assert {(each.pipeline_model_parallel_size, each.recompute_granularity)
            for each in Layouts(base, {}, GPUS)} == {(1, None)}  # fmt: skip


def test_the_first_is_the_fastest_of_all_dry_runs(hardware: Hardware) -> None:
    base = small(**GPT)
    fixed = FEW | {"tensor_model_parallel_size": 2, "micro_batch_size": 2}
    plans = [
        dry_run(layout.applied_to(base), GPTPretraining, GPUS, hardware)
        for layout in Layouts(base, fixed, GPUS)
    ]
    assert len(plans) > 12
    needed = sorted(max(map(peak_bytes, plan.ranks)) for plan in plans)
    # Everything fits; then no more than half of it.
    for usable in (hardware.memory, needed[len(needed) // 2]):
        margin = hardware.memory - hardware.reserved - usable
        found = search(base, GPTPretraining, GPUS, hardware, fixed=fixed, margin=margin, wanted=2)
        times = sorted(
            plan.step_time for plan in plans if max(map(peak_bytes, plan.ranks)) <= usable
        )
        assert [each.plan.step_time for each in found.best] == times[:2]


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        (
            GPT,
            {"use_distributed_optimizer": True, "shard_gradients": True, "micro_batch_size": 2},
        ),
        (GPT, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zb-h1"}),
        (BERT, {"tensor_model_parallel_size": 2, "recompute_granularity": "full"}),
        (
            T5,
            {
                "pipeline_model_parallel_size": 4,
                "pipeline_model_parallel_split_rank": 2,
                "micro_batch_size": 2,
            },
        ),
        (
            GPT | {"untie_embeddings_and_output_weights": True, "num_query_groups": 2},
            {
                "pipeline_model_parallel_size": 2,
                "pipeline_schedule": "interleaved",
                "num_layers_per_virtual_pipeline_stage": 1,
                "use_distributed_optimizer": True,
            },
        ),
    ],
    ids=["gpt-streamed", "gpt-zero-bubble", "bert-recomputed", "t5-pipeline", "llama-virtual"],
)
def test_a_composed_plan_is_nearly_the_real_one(
    flags: dict[str, Any], chosen: dict[str, Any], hardware: Hardware
) -> None:
    base, task = small(**flags), TASKS[flags["model_type"]]
    plain = Layout(1, 1, None, "1f1b", None, False, False, False, None, 8)
    layout = replace(plain, **chosen)
    book = PartBook(base, task)
    composed = put_together(book.recorded(layout, GPUS), hardware)
    estimated = Estimator(base, task, book, GPUS, hardware).estimate(layout)
    real = dry_run(layout.applied_to(base), task, GPUS, hardware)
    needed = max(map(peak_bytes, real.ranks))
    assert composed.step_time == pytest.approx(real.step_time, rel=0.05)
    assert max(map(peak_bytes, composed.ranks)) == pytest.approx(
        needed, rel=0.15 if layout.shard_gradients else 0.05
    )
    assert 0.6 * real.step_time < estimated.seconds < 1.06 * real.step_time
    assert 0.5 * needed < estimated.bytes < 1.05 * needed


@pytest.fixture(scope="module")
def found(hardware: Hardware) -> Search:
    """A search in which memory is short enough for recomputation to matter."""
    base = small(**GPT | {"num_layers": 4, "global_batch_size": 16})
    fixed = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 2,
             "shard_gradients": False, "pipeline_model_parallel_size": 2}  # fmt: skip
    margin = hardware.memory - hardware.reserved - int(4.5 * GIB)
    return search(base, GPTPretraining, GPUS, hardware, fixed=fixed, margin=margin, wanted=3)


def test_nothing_shown_exceeds_the_memory_and_all_is_ordered(found: Search) -> None:
    assert len(found.best) == 3
    assert found.usable == pytest.approx(4.5 * GIB, abs=1)
    assert all(max(map(peak_bytes, each.plan.ranks)) <= found.usable for each in found.best)
    times = [each.plan.step_time for each in found.best]
    assert times == sorted(times)
    assert found.too_large
    assert found.closest is not None
    assert found.closest.bytes > 0.97 * found.usable


def test_fixed_flags_stay(found: Search) -> None:
    assert {(each.layout.tensor_model_parallel_size, each.layout.micro_batch_size)
            for each in found.best} == {(2, 2)}  # fmt: skip


def test_the_flags_of_a_row_give_its_figures(found: Search, hardware: Hardware) -> None:
    shown = found.best[-1]
    words = [f"--{name.replace('_', '-')}={value}" for name, value in GPT.items()
             if name not in (*AXES, "bf16", "model_type")]  # fmt: skip
    config, _ = read_config(
        [*words, "--global-batch-size=16", "--bf16", "--lr=1e-4", "--train-iters=10",
         *shown.layout.flags()],
        defaults={"model_type": "gpt"},
        world_size=GPUS,
    )  # fmt: skip
    plan = dry_run(config, GPTPretraining, GPUS, hardware)
    assert plan.step_time == shown.plan.step_time
    assert plan.ranks == shown.plan.ranks


def test_reasons_add_up_and_compare(found: Search) -> None:
    for each in found.best:
        assert sum(asdict(spent(each)).values()) == pytest.approx(each.plan.step_time)
    assert reason(found.best[0], found).startswith("fastest: ")
    assert "% slower with " in reason(found.best[1], found)
    assert f"{found.tried:,} valid layouts" in summary(found)[0]


def test_a_search_is_the_same_again(hardware: Hardware) -> None:
    base = small(**GPT)
    fixed = FEW | {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2, "micro_batch_size": 4,
        "pipeline_schedule": "1f1b",
    }  # fmt: skip
    first, second = (
        search(base, GPTPretraining, GPUS, hardware, fixed=fixed, wanted=1) for _ in range(2)
    )
    assert [(e.layout, e.plan) for e in first.best] == [(e.layout, e.plan) for e in second.best]


def test_a_hopeless_case_is_explained(hardware: Hardware) -> None:
    base = small(**GPT | {"num_layers": 8})
    fixed = {"pipeline_model_parallel_size": 1, "micro_batch_size": 1, "sequence_parallel": False,
             "recompute_granularity": "full", "shard_gradients": False}  # fmt: skip
    margin = hardware.memory - hardware.reserved - 4 * GIB
    found = search(base, GPTPretraining, 2, hardware, fixed=fixed, margin=margin)
    assert found.best == []
    assert found.closest is not None
    assert found.closest.bytes > 4 * GIB
    assert found.least_gpus is not None
    assert found.least_gpus > 2
    text = " ".join(summary(found))
    assert f"Nothing fits on 2 GPUs; {found.least_gpus} would be enough." in text


def test_no_valid_layout_is_an_error(hardware: Hardware) -> None:
    with pytest.raises(ConfigError, match="no layout of 7 GPUs is valid"):
        search(small(**GPT), GPTPretraining, 7, hardware)
    with pytest.raises(ConfigError, match="--global-batch-size is required"):
        search(small(**GPT | {"global_batch_size": None}), GPTPretraining, 2, hardware)
