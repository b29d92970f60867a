"""Tokens scored in pieces have the losses and gradients of tokens scored all at once."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron.model import module
from megatron.mpu import (
    ParallelState,
    Topology,
    linear_cross_entropy,
    parallel_lm_logits,
    vocab_parallel_cross_entropy,
)
from megatron.mpu.collectives import own_piece
from megatron.mpu.parallel_state import Axis
from megatron.ops import kernels
from tests.distributed import run_distributed
from tests.parity.runs import Case, assert_equals_one_process

SEQUENCE, BATCH, HIDDEN, VOCABULARY, PADDED = 8, 3, 6, 17, 24
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def _inputs(axis: Axis, dtype: torch.dtype, split_sequence: bool) -> list[torch.Tensor]:
    """This rank's part of hidden states, weight and bias, and all targets."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    bias = torch.randn(PADDED, generator=generator, dtype=torch.float64)
    target = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator).t()
    parts = [own_piece(x, axis, dim=0) if split_sequence else x]
    parts += [own_piece(each, axis, dim=0) for each in (weight, bias)]
    return [*(each.to(dtype, copy=True).contiguous() for each in parts), target]


def _both(chunk: int, axis: Axis, dtype: torch.dtype, options: dict[str, bool]) -> None:
    """In pieces and at once, with the same collectives."""
    split_sequence, has_bias, main_grad, frozen = (
        options.get(name, False) for name in ("split_sequence", "bias", "main_grad", "frozen")
    )
    weights = torch.linspace(0.0, 2.0, SEQUENCE * BATCH).view(SEQUENCE, BATCH)
    results, collectives = [], []
    for pieces in (False, True):
        *parts, target = _inputs(axis, dtype, split_sequence)
        x, weight, bias = (each.requires_grad_() for each in parts)
        weight.requires_grad_(not frozen)
        if main_grad:
            wide = torch.promote_types(dtype, torch.float32)
            weight.main_grad = torch.full_like(weight, 3.0, dtype=wide)
        given = bias if has_bias else None
        if main_grad and pieces and has_bias:
            bias.main_grad = torch.zeros_like(bias)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as calls:
            if pieces:
                loss = linear_cross_entropy(
                    *(x, weight, given, target, axis, VOCABULARY),
                    chunk=chunk,
                    split_sequence=split_sequence,
                )
            else:
                logits = parallel_lm_logits(
                    x, weight, axis, given, sequence_parallel=split_sequence
                )
                loss = vocab_parallel_cross_entropy(logits, target, axis, VOCABULARY)
            (loss * weights).sum().backward()
        collectives.append(calls.call_count)
        assert (weight.grad is None) == (main_grad or frozen)
        results.append([loss, x.grad, *(getattr(p, "main_grad", p.grad) for p in (weight, bias))])
    assert collectives[0] == collectives[1]
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and one.shape == other.shape
            difference = (one - other).double().norm()
            assert difference <= TOLERANCES[dtype] * one.double().norm()


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [
        ("torch", torch.float64),
        ("torch", torch.float32),
        ("emulated", torch.float32),
        ("emulated", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_pieces_equal_the_whole(chunk: int, choice: str, dtype: torch.dtype) -> None:
    axis = ParallelState.single().tensor
    with kernels.using(choice):
        for options in (
            {"bias": True},
            {"main_grad": True},
            {"bias": True, "main_grad": dtype == torch.float64},
            {"frozen": True},
        ):
            _both(chunk, axis, dtype, options)


def _on_some_ranks(tensor: int, choice: str) -> None:
    axis = ParallelState.create(Topology(tensor, tensor=tensor)).tensor
    dtype = torch.float64 if choice == "torch" else torch.float32
    with kernels.using(choice):
        for split_sequence in (False, True):
            options = {"split_sequence": split_sequence, "bias": True, "main_grad": True}
            _both(7, axis, dtype, options)


# The last of two ranks has padding beside real tokens, the last of four nothing else.
@pytest.mark.parametrize("choice", ["torch", "emulated"])
@pytest.mark.parametrize("tensor", [2, 4])
def test_split_over_the_vocabulary(tensor: int, choice: str) -> None:
    run_distributed(tensor, _on_some_ranks, tensor, choice)


class _Largest(TorchDispatchMode):
    """Sees the results of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_iter(result) if isinstance(each, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("choice", ["torch", "emulated"])
def test_the_logits_of_all_tokens_are_never_there(choice: str) -> None:
    rows, hidden, vocabulary, chunk = 64, 4, 50, 8
    x = torch.randn(rows, hidden, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, requires_grad=True)
    target, axis = torch.arange(rows) % vocabulary, ParallelState.single().tensor
    largest = {}
    for pieces in (True, False):
        with kernels.using(choice), _Largest() as seen:
            if pieces:
                loss = linear_cross_entropy(x, weight, None, target, axis, vocabulary, chunk=chunk)
            else:
                logits = parallel_lm_logits(x, weight, axis, None)
                loss = vocab_parallel_cross_entropy(logits, target, axis, vocabulary)
            loss.sum().backward()
        largest[pieces] = seen.elements
    assert largest == {True: chunk * vocabulary, False: rows * vocabulary}


@pytest.mark.parametrize("network", ["bert", "gpt", "t5"])
def test_networks_score_in_pieces_as_they_are_told(network: str) -> None:
    with mock.patch.object(module, "linear_cross_entropy", wraps=linear_cross_entropy) as called:
        assert_equals_one_process(Case.of(network, cross_entropy_chunk=7))
    assert called.called


@pytest.mark.parametrize(
    "case",
    [
        Case.of(
            "bert",
            ranks=2,
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            cross_entropy_chunk=3,
        ),
        Case.of(
            "llama",
            ranks=4,
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            pipeline_schedule="zb-h1",
            sequence_parallel=True,
            cross_entropy_chunk=7,
        ),
        Case.of(
            "gpt",
            ranks=2,
            pipeline_model_parallel_size=2,
            pipeline_layers=(3, 2),
            cross_entropy_chunk=11,
        ),
        Case.of(
            "t5, relative",
            ranks=2,
            use_distributed_optimizer=True,
            shard_gradients=True,
            cross_entropy_chunk=4,
        ),
    ],
    ids=str,
)
def test_training_in_pieces_equals_training_at_once(case: Case) -> None:
    assert_equals_one_process(case)
