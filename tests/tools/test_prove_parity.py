"""prove_parity.py agrees where a layout is right, and names the parameter where it is not."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.model import residual
from megatron.mpu import ParallelState, ShardSpec, layers
from megatron.mpu.products import Products, flatten
from megatron.training.initialize import rank_grid
from megatron.validation import validate
from tests.configs import argv_of, small
from tests.distributed import run_distributed
from tests.parity.layouts import draw_case
from tests.training.corpus import write_corpus
from tools import prove_parity
from tools.parity.changes import Wish, comparable, one_process
from tools.parity.processes import record_rank
from tools.parity.recording import RankRecord, Recording, assemble

ROOT = Path(__file__).parents[2]
STEPS = 2
FLAGS = {
    "num_layers": 2,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "global_batch_size": 4,
    "tensor_model_parallel_size": 2,
    "use_cpu": True,
}


def _config(**changes: Any) -> Config:
    return comparable(small(**FLAGS | changes), Wish(), ranks=2)[0]


def _rank(config: Config) -> RankRecord:
    state = ParallelState.create(rank_grid(config, 2))
    return record_rank(config, state, STEPS)


def _alone(config: Config) -> Recording:
    return assemble([record_rank(one_process(config, 2), ParallelState.single(), STEPS)])


def _rows(found: Recording, expected: Recording) -> dict[str, prove_parity.Row]:
    rows = prove_parity.compare(found, expected, prove_parity.TOLERANCES["fp64"])
    return {row.quantity: row for row in rows}


# ------------------------------------------------------------------------------- what is broken

BROKEN = "language_model.encoder.layers.1.mlp.dense_4h_to_h.weight"
PARTIAL = "language_model.encoder.layers.1.input_layernorm.weight"


def _with_swapped_parts(config: Config) -> RankRecord:
    """One weight whose two parts each lie on the other's rank."""
    create = layers._new

    def swapped(spec: ShardSpec, state: ParallelState, *rest: Any) -> nn.Parameter:
        if spec.name == BROKEN:
            other = dataclasses.replace(state.tensor, rank=1 - state.tensor.rank)
            state = dataclasses.replace(state, tensor=other)
        return create(spec, state, *rest)

    with mock.patch.object(layers, "_new", swapped):
        return _rank(config)


def _with_a_wrong_gradient(config: Config) -> RankRecord:
    """One weight whose gradient lacks a term on one rank."""
    add = layers._weight_gradient

    def halved(
        products: Products,
        weight: torch.Tensor,
        grads: torch.Tensor,
        held: Sequence[torch.Tensor],
        gathered: torch.Tensor | None,
    ) -> torch.Tensor | None:
        if weight.shard_spec.name == BROKEN:  # type: ignore[attr-defined]
            rows = len(grads) // 2
            grads, held = grads[:rows], [flatten(held[0])[:rows]]
        return add(products, weight, grads, held, gathered)

    with mock.patch.object(layers, "_weight_gradient", halved):
        return _rank(config)


def _with_a_forgotten_sum(config: Config) -> RankRecord:
    """A norm on a split sequence whose gradients are not summed over the tensor ranks."""

    def whole(name: str, *rest: Any, partial: bool = False) -> ShardSpec:
        return ShardSpec(name, *rest, partial=partial and name != PARTIAL)

    with mock.patch.object(residual, "ShardSpec", whole):
        return _rank(config)


def _with_a_missing_reduction(config: Config) -> RankRecord:
    """A row-parallel layer whose terms are not added up."""
    reduce = layers.reduce_from_tensor_region
    forward = layers.RowParallelLinear.forward

    def without(layer: layers.RowParallelLinear, x: torch.Tensor, **rest: Any) -> torch.Tensor:
        is_broken = layer.weight.shard_spec.name == BROKEN  # type: ignore[attr-defined]
        kept = (lambda y, axis: y) if is_broken else reduce
        with mock.patch.object(layers, "reduce_from_tensor_region", kept):
            return forward(layer, x, **rest)

    with mock.patch.object(layers.RowParallelLinear, "forward", without):
        return _rank(config)


SPLIT = {"sequence_parallel": True}


@pytest.mark.parametrize(
    ("break_it", "flags", "quantity", "name"),
    [
        (_with_swapped_parts, {}, "initial weights", BROKEN),
        (_with_swapped_parts, {}, "first wrong output", BROKEN),
        (_with_a_missing_reduction, {}, "first wrong output", BROKEN),
        (_with_a_wrong_gradient, {}, "worst gradient", BROKEN),
        (_with_a_forgotten_sum, SPLIT, "worst gradient", PARTIAL),
        (_with_a_forgotten_sum, SPLIT, "copies of gradients", PARTIAL),
    ],
)
def test_a_broken_split_is_named(
    break_it: Any, flags: dict[str, Any], quantity: str, name: str
) -> None:
    config = _config(**flags)
    expected = _alone(config)
    row = _rows(assemble(run_distributed(2, break_it, config)), expected)[quantity]
    assert not row.agrees and row.difference > 1e-3
    assert row.where == name
    sound = _rows(assemble(run_distributed(2, _rank, config)), expected)
    assert all(row.agrees for row in sound.values())


def test_the_command_says_so_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(config: Config, ranks: int, steps: int) -> Recording:
        if ranks == 1:
            return assemble([record_rank(config, ParallelState.single(), steps)])
        return assemble(run_distributed(2, _with_swapped_parts, config))

    monkeypatch.setattr(prove_parity, "record_in_processes", in_this_process)
    argv = ["--model", "bert", "--ranks", "2", "--steps", str(STEPS)]
    flags = small(**FLAGS).to_flags()
    changed = {name: value for name, value in flags.items() if value not in (None, False, ())}
    assert prove_parity.main([*argv, *argv_of(changed)]) == 1
    output = capsys.readouterr().out
    assert BROKEN in output and "WRONG" in output and "NOT the same as one process" in output
    assert "--hidden-dropout 0.0: " in output


# -------------------------------------------------------------------------------- what is asked


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/prove_parity.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_whole_comparison_of_a_shrunk_t5() -> None:
    flags = {
        **FLAGS,
        "hidden_size": 64,
        "num_layers": 12,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "decoder_seq_length": 8,
        "micro_batch_size": 2,
        "train_iters": 1000,
        "lr": 1e-3,
        "lr_warmup_iters": 100,
        "bf16": True,
        "sequence_parallel": True,
        "position_embedding_type": "relative",
    }
    shrunk = ["--layers", "1", "--hidden", "32", "--steps", "2"]
    result = _run("--model", "t5", "--ranks", "2", *shrunk, *argv_of(flags))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "t5 on 2 ranks, 2 steps in fp64: the same as one process"
    for quantity in ("loss", "gradient norm", "worst gradient", "worst weight"):
        (row,) = (line for line in lines if line.startswith(f"{quantity}  "))
        difference, tolerance = map(float, row.removeprefix(quantity).split()[:2])
        assert difference <= tolerance == 1e-11


def test_samples_of_a_real_dataset(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    data = {
        "data_path": (str(corpus.prefix),),
        "vocab_file": str(corpus.vocab_file),
        "data_cache_dir": str(tmp_path),
    }
    config = _config(**data)
    assert config.model.vocab_size is not None and config.model.vocab_size < 1000
    rows = _rows(assemble(run_distributed(2, _rank, config)), _alone(config))
    assert all(row.agrees for row in rows.values())


def test_impossible_flags_are_reported_before_any_work() -> None:
    flags = {"hidden_size": 30, "num_attention_heads": 3, "lr": 1.0, "train_iters": 1}
    argv = argv_of({**FLAGS, **flags, "micro_batch_size": 1})
    with pytest.raises(ConfigError, match="--num-attention-heads 3 is not divisible"):
        prove_parity.main(["--model", "bert", "--ranks", "2", *argv])


def test_only_what_was_asked_for_and_dropout_is_changed() -> None:
    before = small(**FLAGS, bf16=True, lr_warmup_iters=3)
    after, notes = comparable(before, Wish(layers=4, hidden=64), ranks=2)
    old, new = before.to_flags(), after.to_flags()
    changed = {name for name in new if new[name] != old[name]}
    assert changed == {
        *("num_layers", "hidden_size", "hidden_dropout", "attention_dropout", "bf16", "fp64"),
        *("lr_warmup_iters", "num_workers", "vocab_size"),
    }
    assert len(notes) == len(changed)


def test_whatever_can_be_trained_can_be_compared() -> None:
    draw = random.Random(3)
    for _ in range(300):
        case = draw_case(draw)
        config, _ = comparable(case.config(), Wish(), case.ranks)
        assert validate(one_process(config, case.ranks), 1) == []


def test_one_process_has_the_same_global_batch_and_nothing_parallel() -> None:
    config = _config(global_batch_size=None)
    alone = one_process(config, ranks=8)
    assert alone.train.global_batch(1) == config.train.global_batch(4)
    assert alone.parallel.tensor_model_parallel_size == 1
    assert alone.parallel.use_cpu
