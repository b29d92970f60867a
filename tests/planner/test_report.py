"""A plan as text and as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from megatron.planner.plan import Plan
from megatron.planner.report import peak_bytes, plan_json, usable_bytes
from megatron.planner.text import plan_text
from tests.planner.plans import GIB, plan


def _block(made: Plan, title: str) -> list[str]:
    """The lines of the first block that begins so, without its title."""
    block = next(block for block in plan_text(made).split("\n\n") if block.startswith(title))
    return block.splitlines()[1:]


def _memory_rows(made: Plan) -> list[list[str]]:
    """The cells of the table's rows, without its header."""
    lines = _block(made, "Memory")[1:]
    return [re.split(r"  +", line) for line in lines if line[0].isdigit()]


PLANS = {
    "small": plan(),
    "one rank": plan(ranks=1),
    "long": plan(ranks=64, micro_batches=128, activations=GIB // 2),
    "interleaved": plan("interleaved", 8, 16, 3),
    "too large": plan("zb-2p", 8, 24, activations=6000 * GIB),
    "encoder-decoder": plan(ranks=2, model_type="t5", decoder_seq_length=128),
}


@pytest.mark.parametrize("name", PLANS)
def test_it_fits_a_terminal_and_needs_nothing_of_it(name: str) -> None:
    text = plan_text(PLANS[name])
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search(" \n|\x1b", text)  # no blanks at the ends of lines, no colours


@pytest.mark.parametrize("name", PLANS)
def test_figures_of_a_column_end_in_the_same_place(name: str) -> None:
    header, *rows = _block(PLANS[name], "Memory")
    for column in ("parameters", "weights", "gradients", "optimizer", "activations", "sum"):
        end = header.index(column) + len(column)
        for row in rows:
            if row[0].isdigit():
                assert row[end - 1] != " "
                assert row[end] == " "


def test_the_head_says_what_is_planned() -> None:
    head = plan_text(plan(ranks=64, micro_batches=128)).split("\n\n")[0].splitlines()
    assert head == [
        "GPT, 1,006.7 B parameters: 128 layers, hidden 25600, 160 heads, sequence 2048, "
        "vocabulary 51200",
        "3072 x a100-80gb, 384 nodes: tensor 8 x pipeline 64 x data 6",
        "batch 768 = data 6 x 128 micro-batches of 1; 1f1b schedule; float16, full recomputation",
    ]
    assert "pipeline 8 x virtual 3 x data 6" in plan_text(PLANS["interleaved"])


def test_memory_is_that_of_the_plan() -> None:
    made = plan()
    for row, rank in zip(_memory_rows(made), made.ranks, strict=True):
        amounts = (rank.weights, rank.gradients, rank.optimizer, rank.activations)
        assert row[:2] == [str(rank.rank), str(rank.rank)]
        assert row[3:] == [f"{a / GIB:.2f}" for a in (*amounts, sum(amounts))] + ["fits"]


def test_neighbours_that_are_alike_share_a_line_and_a_column() -> None:
    made = plan("gpipe", 8, 16)  # every rank holds as many activations
    assert [row[:2] for row in _memory_rows(made)] == [["0", "0"], ["1-6", "1-6"], ["7", "7"]]
    title, header, *rows = _block(made, "Communication")
    assert re.split("  +", title.strip()) == ["rank 0", "ranks 1-6", "rank 7"]
    assert header.split() == ["group", "kind", "GPUs", *["calls", "GiB"] * 3]
    embedding = next(row for row in rows if row.startswith("embedding")).split()
    assert embedding == ["embedding", "all-reduce", "2", "1", "0.61", "-", "-", "1", "0.61"]


def test_a_long_pipeline_is_folded_to_its_fullest_ranks() -> None:
    made = PLANS["long"]
    rows = _memory_rows(made)
    assert [row[0] for row in rows] == ["0", "1-62", "63"]
    assert rows[1][6] == f"{made.ranks[1].activations / GIB:.2f}"
    assert "which shows the fullest" in plan_text(made)


def test_stages_of_several_chunks_are_named() -> None:
    assert [row[1] for row in _memory_rows(PLANS["interleaved"])][:2] == ["0, 8, 16", "1, 9, 17"]
    many = plan("interleaved", 8, 16, 6)
    assert [row[1] for row in _memory_rows(many)][:2] == ["0 .. 40", "1 .. 41"]


def test_it_says_by_how_much_a_rank_does_not_fit() -> None:
    made = plan()
    fullest = max(made.ranks, key=peak_bytes)
    spare = usable_bytes(made) - peak_bytes(fullest)
    full = replace(
        made, ranks=(replace(fullest, activations=fullest.activations + spare), *made.ranks[1:])
    )
    assert plan_json(full)["fits"]
    assert "\nfits: rank 0 needs 78.00 of 78.00 GiB, 0.00 left\n" in plan_text(full)
    over = replace(full, hardware=replace(full.hardware, reserved_gib=2.5))
    assert not plan_json(over)["fits"]
    assert _memory_rows(over)[0][-1] == "0.50 over"
    assert [row[-1] for row in _memory_rows(over)[1:]] == ["fits"] * 3
    assert "does not fit: rank 0 needs 78.00 of 77.50 GiB, 0.50 too much" in plan_text(over)


def test_of_many_kinds_of_ranks_the_busiest_sends() -> None:
    made = plan(ranks=8)
    apart = tuple(
        replace(
            rank,
            communications=tuple(
                replace(total, bytes=total.bytes * (1 + rank.rank % 7))
                for total in rank.communications
            ),
        )
        for rank in made.ranks
    )
    columns = _block(replace(made, ranks=apart), "Communication")[0].strip()
    assert columns == "rank 6"
    five = replace(made, ranks=(*apart[:4], *made.ranks[4:7], made.ranks[7]))
    text = plan_text(five)
    assert [text.count(f"  rank {rank}") for rank in range(4)] == [1, 1, 1, 1]
    assert "ranks 4-6" in text


def test_one_gpu_has_nothing_to_say_to_others() -> None:
    made = plan(ranks=1)
    silent = replace(made, ranks=(replace(made.ranks[0], communications=()),))
    assert "No communication: one GPU has all.\n" in plan_text(silent)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"train_iters": 3}, (3, "3 steps;")),
        ({"train_iters": None, "train_samples": 97}, (2, "2 steps;")),
        ({"train_iters": None}, None),
        (
            {"train_iters": None, "train_samples": 10**6, "rampup_batch_size": (6, 6, 10**4)},
            (20833, "20,833 full steps;"),
        ),
    ],
)
def test_the_length_of_the_run(flags: dict[str, Any], expected: tuple[int, str] | None) -> None:
    made = plan(**flags)  # of 48 samples a step
    run = plan_json(made)["run"]
    if expected is None:
        assert run is None
        assert "whole run" not in plan_text(made)
        return
    steps, words = expected
    assert run["steps"] == steps
    assert run["seconds"] == pytest.approx(steps * made.step_time)
    assert words in plan_text(made)


def test_tokens_of_an_encoder_decoder_are_those_of_both_sequences() -> None:
    made = PLANS["encoder-decoder"]
    step = plan_json(made)["step"]
    assert step["tokens"] == 48 * (2048 + 128)
    assert f"{step['tokens'] / made.step_time:,.0f} tokens/s" in plan_text(made)


@pytest.mark.parametrize("name", PLANS)
def test_the_json_is_plain_and_adds_up(name: str) -> None:
    made = PLANS[name]
    found = plan_json(made)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["layout"]["virtual"] * len(found["ranks"]) == made.schedule.num_stages
    for entry, rank in zip(found["ranks"], made.ranks, strict=True):
        parts = ("weights", "gradients", "optimizer", "activations")
        assert entry["peak_bytes"] == sum(entry[f"{part}_bytes"] for part in parts)
        assert sum(c["bytes"] for c in entry["communications"]) == sum(
            total.bytes for total in rank.communications
        )
    step, gpus = found["step"], found["cluster"]["gpus"]
    rate = step["model_tflops_per_second_per_gpu"]
    assert rate * 1e12 * gpus * step["seconds"] == pytest.approx(step["model_flops"])
    assert step["mfu"] == pytest.approx(rate / found["cluster"]["peak_tflops_per_second"])


def test_every_key_of_the_json_is_described() -> None:
    found = plan_json(plan())
    rank = found["ranks"][0]
    parts = [found, *(found[name] for name in ("model", "cluster", "layout", "step", "run"))]
    keys = {key for part in (*parts, rank, rank["communications"][0]) for key in part}
    words = set(re.findall(r"\w+", plan_json.__doc__ or ""))
    assert keys - words == set()


def test_text_and_pictures_need_no_torch() -> None:
    program = "import sys, megatron.planner.picture; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
