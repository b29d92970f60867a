"""Runs that stop and go on, through checkpoints on disk.

Rung 4 of the parity ladder: on the same layout, dropout on, a run that stopped and went on is
bitwise the run that did not. On other layouts it goes on as one process would, within rung 2's
tolerance.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron.training import checkpoints
from tests.distributed import run_distributed
from tests.parity.runs import TOLERANCES, Case, new_trainer, own_batches
from tools.parity.comparison import compare
from tools.parity.recording import RankRecord, Recording, assemble, record


def _stretch_rank(case: Case, directory: Path, steps: int) -> RankRecord:
    """Go on from the checkpoint in the directory where there is one, train, and save."""
    trainer = new_trainer(case.with_flags(load=str(directory), save=str(directory)))
    checkpoints.resume(trainer)
    first, rank = trainer.iteration, trainer.state.data.rank
    result = record(trainer, steps, lambda step, size: own_batches(case, first + step, size, rank))
    checkpoints.save(trainer, directory)
    trainer.finish()
    if dist.is_initialized():
        trainer.state.destroy()
    return result


def _stretch(case: Case, directory: Path, steps: int) -> Recording:
    if case.ranks == 1:
        return assemble([_stretch_rank(case, directory, steps)])
    return assemble(run_distributed(case.ranks, _stretch_rank, case, directory, steps))


STEPS = (2, 2, 2)
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
BY_TWO = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    "case",
    [
        Case.of(ranks=4, **BY_TWO, pipeline_layers=(2, 3), recompute_granularity="selective"),
        Case.of(
            "gpt, documents",
            4,
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            use_distributed_optimizer=True,
            shard_gradients=True,
            recompute_granularity="full",
        ),
        Case.of(
            "llama",
            4,
            pipeline_model_parallel_size=2,
            pipeline_schedule="interleaved",
            pipeline_layers=(1, 2, 2, 1),
            use_distributed_optimizer=True,
            fp64=False,
            bf16=True,
        ),
        Case.of(
            "t5",
            3,
            pipeline_model_parallel_size=3,
            pipeline_model_parallel_split_rank=2,
            pipeline_layers=(1, 2, 2),
            pipeline_schedule="zb-2p",
        ),
    ],
    ids=str,
)
def test_stopping_changes_no_bit(case: Case, tmp_path: Path) -> None:
    case = case.with_flags(**DROPOUT)
    through = _stretch(case, tmp_path / "through", 4)
    stopped = [_stretch(case, tmp_path / "stopped", 2) for _ in range(2)]
    for name in ("losses", "norms"):
        parts = [getattr(part, name) for part in stopped]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(through, name))
    assert through.weights.values.keys() == stopped[1].weights.values.keys()
    for name, weight in through.weights.values.items():
        np.testing.assert_array_equal(stopped[1].weights.values[name], weight, err_msg=name)
    # Without dropout it is another run: the random numbers have been restored, not left out.
    without = _stretch(case.with_flags(hidden_dropout=0.0), tmp_path / "without", 1)
    assert not np.array_equal(without.losses[0], through.losses[0])


def _layouts(network: str, *distributed: bool) -> list[Case]:
    """(tensor, pipeline, data) = (2, 2, 2), (1, 4, 1), (4, 1, 2)"""
    stages: list[dict[str, Any]] = [
        {"pipeline_layers": (2, 3)},
        {"pipeline_layers": (1, 2, 1, 1)},
        {"sequence_parallel": True},
    ]
    if network == "t5":
        stages[0] = {"pipeline_layers": (3, 2)}
        stages[1] = {"pipeline_layers": (1, 2, 1, 1)}
    sizes = [(2, 2, 2), (1, 4, 1), (4, 1, 2)]
    return [
        Case.of(
            network,
            t * p * d,
            tensor_model_parallel_size=t,
            pipeline_model_parallel_size=p,
            use_distributed_optimizer=own,
            **more,
        )
        for (t, p, d), more, own in zip(sizes, stages, distributed, strict=True)
    ]


@pytest.mark.parametrize(
    ("network", "distributed"),
    [
        *product(["bert", "gpt", "t5"], [(True, True, True), (False, False, False)]),
        ("gpt", (True, False, True)),
    ],
)
def test_a_run_goes_on_in_another_layout(
    network: str, distributed: tuple[bool, ...], tmp_path: Path
) -> None:
    cases = _layouts(network, *distributed)
    parts = [
        _stretch(case, tmp_path / "on", steps) for case, steps in zip(cases, STEPS, strict=True)
    ]
    expected = _stretch(cases[0].on_one_process(), tmp_path / "alone", sum(STEPS))
    found = replace(
        parts[0],
        losses=np.concatenate([part.losses for part in parts]),
        norms=np.concatenate([part.norms for part in parts]),
        weights=parts[-1].weights,
    )
    for row in compare(found, expected, TOLERANCES["fp64"]):
        assert row.agrees, f"{row.quantity}, {row.where}: differs by {row.difference:.2e}"
