"""A step on a GPU: nobody waits, and neither graphs nor ranks that share it change anything."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.mpu import ParallelState
from megatron.ops import matmul
from megatron.ops.embedding import add_rows
from megatron.training.batches import training_batches
from megatron.training.graphs import WARM_UPS
from megatron.training.initialize import rank_grid
from megatron.training.trainer import Trainer
from tests.distributed import run_distributed
from tests.training.tiny import TASKS, Samples, micro_batches, random_samples, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda", 0)
STEPS, GLOBAL_BATCH = 4, 4
SINGLE, HALF = {"fp64": False}, {"fp64": False, "bf16": True}
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}


def _samples(kind: str, count: int) -> list[dict[str, Tensor]]:
    samples = random_samples(count, seed=5, model_type=kind)
    for sample in samples:
        sample.pop("document_lengths", None)
    return samples


def _trainer(ranks: int = 1, *, graphs: bool = False, **sections: Any) -> Trainer:
    run = {"micro_batch_size": 1, "global_batch_size": GLOBAL_BATCH, "train_iters": STEPS}
    config = tiny_config(**sections, train=run | {"cuda_graphs": graphs})
    torch.cuda.set_device(GPU)
    if ranks == 1:
        state = ParallelState.single(GPU)
    else:
        state = ParallelState.create(rank_grid(config, ranks), device=GPU)
    return Trainer(config, TASKS[config.model.model_type](config), state)


def _history(trainer: Trainer) -> list[list[float]]:
    dataset = Samples(_samples(trainer.config.model.model_type, STEPS * GLOBAL_BATCH))
    history = [
        [*trainer.over_ranks(step.parts).tolist(), step.grad_norm.item()]
        for step in trainer.steps(training_batches(trainer, dataset))
    ]
    trainer.finish()
    return history


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("kind", ["bert", "gpt", "t5"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_nobody_waits_in_a_step(kind: str, dtype: dict[str, bool], graphs: bool) -> None:
    trainer = _trainer(graphs=graphs, model={"model_type": kind, **dtype, **DROPOUT})
    batches = micro_batches(_samples(kind, GLOBAL_BATCH), 1)
    parts = torch.zeros(len(trainer.task.loss_parts), dtype=torch.float64, device=GPU)
    for _ in range(2):  # what is loaded, tried out or recorded is waited for
        trainer.step(batches)
    with _waiting_is_an_error():
        for _ in range(2):
            step = trainer.step(batches)
            parts += torch.where(step.skipped, 0, step.parts)
    assert parts.isfinite().all()


@pytest.mark.parametrize("kind", ["bert", "gpt", "t5"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_graphs_change_nothing(kind: str, dtype: dict[str, bool]) -> None:
    # The fused attentions' backward passes may add up in any order.
    model = {"model_type": kind, "attention_backend": "unfused", **dtype, **DROPOUT}
    assert STEPS * GLOBAL_BATCH > 2 * WARM_UPS
    plain, recorded = _trainer(model=model), _trainer(graphs=True, model=model)
    assert _history(recorded) == _history(plain)
    for (name, found, _), (_, expected, _) in zip(recorded.weights, plain.weights, strict=True):
        assert torch.equal(found, expected), name


def _shared(model: dict[str, Any], parallel: dict[str, Any]) -> list[list[float]]:
    return _history(_trainer(2, model=model, parallel=parallel))


@pytest.mark.parametrize("kind", ["bert", "gpt", "t5"])
@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
        {"use_distributed_optimizer": True},
    ],
    ids=lambda parallel: "-".join(parallel),
)
def test_two_processes_on_one_gpu_train_as_one(kind: str, parallel: dict[str, Any]) -> None:
    model = {"model_type": kind, **SINGLE}
    expected = _history(_trainer(model=model))
    for found in run_distributed(2, _shared, model, parallel):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 300, 128), (1000, 24, 48), (17, 33, 9)])
def test_products_are_added_in_float32(sizes: tuple[int, int, int], narrow: torch.dtype) -> None:
    n, rows, columns = sizes
    a, b = torch.randn(n, rows, device=GPU).to(narrow), torch.randn(n, columns, device=GPU)
    b, total = b.to(narrow), torch.randn(rows, columns, device=GPU)
    exact = total.double() + a.double().t() @ b.double()
    with pytest.MonkeyPatch.context() as patch:
        for wide in (matmul.adds_wide(GPU, narrow, torch.float32), False):
            patch.setattr(matmul, "adds_wide", lambda *_, wide=wide: wide)
            found = total.clone()
            matmul.add_product(found, a.t(), b)
            tolerance = 1e-5 if wide else 2**-7 * 4 * n**0.5
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("table", [2, 64, 30_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embeddings_gradient_is_right_and_repeatable(table: int, dtype: torch.dtype) -> None:
    ids = torch.randint(table, (5000,), device=GPU)
    ids[torch.rand(5000, device=GPU) < 0.5] = 1
    rows = torch.randn(5000, 96, device=GPU).to(dtype)
    exact = torch.zeros(table, 96, dtype=torch.float64, device=GPU)
    exact.index_add_(0, ids, rows.double())
    matmul.adds_wide(GPU, dtype, torch.float32)  # what is tried out is waited for
    found = [torch.zeros(table, 96, device=GPU) for _ in range(2)]
    for total in found:
        with _waiting_is_an_error():
            add_rows(total, ids, rows)
        torch.testing.assert_close(
            total.double(), exact, rtol=1e-5, atol=0.5 if table < 65 else 1e-3
        )
    assert torch.equal(*found)


def test_segments_expand() -> None:
    program = (
        "import torch\n"
        "from megatron.training.initialize import let_segments_expand\n"
        "let_segments_expand(torch.device('cuda', 0))\n"
        "block = torch.empty(1 << 24, device='cuda')\n"
        "assert any(s['is_expandable'] for s in torch.cuda.memory_snapshot())\n"
    )
    conf = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in conf}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
