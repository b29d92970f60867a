"""Cross entropy over a split vocabulary equals that of torch.nn over a whole one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron.mpu import ParallelState, Topology, vocab_parallel_cross_entropy
from megatron.ops import kernels
from tests.distributed import distributed, run_distributed

SIZES = (1, 2, 4)

# Where kernels run, in float32, and where PyTorch's operators do.
FORMATS = {"torch": torch.float64, "emulated": torch.float32}
TOLERANCES = {"torch": 1e-12, "emulated": 1e-6}


def _state(tensor: int) -> ParallelState:
    return ParallelState.create(Topology(tensor, tensor=tensor))


def _equals_torch(tensor: int, vocab: int, padded: int, choice: str) -> None:
    state, dtype = _state(tensor), FORMATS[choice]
    generator = torch.Generator().manual_seed(8)
    # Large logits: a softmax that is not shifted by the maximum overflows.
    whole = 300 * torch.randn(4, 5, padded, dtype=dtype, generator=generator)
    target = torch.randint(vocab, (4, 5), generator=generator)
    target[0, : min(vocab, 5)] = torch.linspace(0, vocab - 1, min(vocab, 5)).long()
    columns = padded // tensor
    mine = slice(state.tensor.rank * columns, (state.tensor.rank + 1) * columns)
    logits = whole[..., mine].clone().requires_grad_()
    before = logits.detach().clone()
    weight = torch.rand(4, 5, dtype=dtype, generator=generator)
    with (
        kernels.using(choice),
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums,
    ):
        loss = vocab_parallel_cross_entropy(logits, target, state.tensor, vocab)
        (loss * weight).sum().backward()
    # The maxima, and the sums together with the targets' logits.
    assert sums.call_count == (2 if tensor > 1 else 0)

    reference = whole[..., :vocab].double().requires_grad_()
    expected = F.cross_entropy(reference.flatten(0, 1), target.flatten(), reduction="none")
    (expected.view(4, 5) * weight).sum().backward()
    near = {"rtol": TOLERANCES[choice], "atol": TOLERANCES[choice]}
    torch.testing.assert_close(loss.double(), expected.view(4, 5), **near)
    assert reference.grad is not None and loss.dtype == dtype
    padding = torch.zeros(4, 5, padded - vocab, dtype=torch.float64)
    grad = torch.cat([reference.grad, padding], dim=-1)[..., mine]
    torch.testing.assert_close(logits.grad.double(), grad, **near)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("choice", FORMATS)
@pytest.mark.parametrize(("vocab", "padded"), [(16, 16), (13, 16), (3, 8), (1, 4)])
@pytest.mark.parametrize("tensor", SIZES)
def test_equals_torch(tensor: int, vocab: int, padded: int, choice: str) -> None:
    run_distributed(tensor, _equals_torch, tensor, vocab, padded, choice)


@pytest.mark.parametrize("choice", FORMATS)
@distributed(2)
def test_half_precision_loss_is_computed_in_float32(choice: str) -> None:
    state = _state(2)
    logits = torch.full((2, 4), 1000.0, dtype=torch.bfloat16, requires_grad=True)
    with kernels.using(choice):
        loss = vocab_parallel_cross_entropy(logits, torch.tensor([0, 7]), state.tensor, 8)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, torch.full((2,), 8.0).log())
        loss.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", FORMATS)
def test_the_gradient_may_take_the_place_of_the_logits(choice: str, dtype: torch.dtype) -> None:
    axis, target = ParallelState.single().tensor, torch.tensor([[0, 4], [8, 2]])
    leaf = torch.randn(2, 2, 12, generator=torch.Generator().manual_seed(2)).to(dtype)
    leaf.requires_grad_()
    gradients = []
    for overwrite in (False, True):
        with kernels.using(choice):
            # As where the sequence is the first dim: rows in another order than their memory's.
            logits = (leaf * 2).transpose(0, 1)
            loss = vocab_parallel_cross_entropy(logits, target, axis, 9, overwrite=overwrite)
            gradients += torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("choice", FORMATS)
def test_a_second_backward_pass_finds_the_logits_gone(choice: str) -> None:
    leaf = torch.randn(3, 8, requires_grad=True)
    with kernels.using(choice):
        loss = vocab_parallel_cross_entropy(
            leaf * 2, torch.tensor([0, 1, 2]), ParallelState.single().tensor, 8, overwrite=True
        ).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
