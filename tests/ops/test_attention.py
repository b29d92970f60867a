"""The attention core: fused or not, with weights or without, the same numbers and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from megatron.ops import fused_attention
from megatron.ops.attention import AttentionCore, AttentionMask
from tests.ops.kernel_cases import DEVICE, FORMATS, TOLERANCES, run, with_kernels

S, Z, B, N, D = 5, 7, 2, 3, 4
LEAST = torch.finfo(torch.float32).min


def random_inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    shapes = [(S, B, N, D), (Z, B, N, D), (Z, B, N, D)]
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def plain(inputs: list[torch.Tensor], bias: torch.Tensor, scale: float) -> torch.Tensor:
    query, key, value = (x.permute(1, 2, 0, 3) for x in inputs)
    weights = torch.softmax(query @ key.transpose(2, 3) * scale + bias, dim=-1)
    return (weights @ value).permute(2, 0, 1, 3).flatten(2)


def gradients(result: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.cos(torch.arange(result.numel()).float()).view_as(result)
    return list(torch.autograd.grad((result * weights).sum(), inputs))


@pytest.mark.parametrize("scale", [None, 0.3, 1.0])
@pytest.mark.parametrize("backend", ["auto", "unfused"])
def test_scores_are_scaled_as_asked(backend: str, scale: float | None) -> None:
    inputs = random_inputs()
    core = AttentionCore(backend=backend, scale=scale)
    expected = plain(inputs, torch.zeros(()), D**-0.5 if scale is None else scale)
    torch.testing.assert_close(core(*inputs, AttentionMask()), expected)


def test_queries_that_see_nothing_have_equal_weights_and_their_gradient() -> None:
    inputs = random_inputs()
    bias = torch.zeros(B, 1, S, Z)
    bias[0, :, :, 4:] = LEAST
    bias[1, :, 2] = LEAST
    mask = AttentionMask(bias=bias, hides_all=True)
    result, expected = AttentionCore()(*inputs, mask), plain(inputs, bias, D**-0.5)
    torch.testing.assert_close(result, expected)
    for ours, theirs in zip(gradients(result, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_are_those_of_the_result_and_heads_can_be_silenced() -> None:
    inputs = random_inputs()
    head_mask = torch.tensor([1.0, 0.0, 0.5]).view(1, N, 1, 1)
    result, weights = AttentionCore().with_weights(*inputs, AttentionMask(), head_mask)
    value = inputs[2].permute(1, 2, 0, 3)
    torch.testing.assert_close(result, (weights @ value).permute(2, 0, 1, 3).flatten(2))
    sums = weights.sum(-1)
    torch.testing.assert_close(sums, head_mask[..., 0].expand_as(sums))


MASKS = {
    "nothing": AttentionMask(),
    "causal": AttentionMask(causal=True),
    "padding": AttentionMask(
        keys=torch.arange(Z).view(1, 1, 1, Z) < torch.tensor([[[[4]]], [[[Z]]]])
    ),
}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", MASKS)
def test_weights_come_from_the_kernel_where_it_runs(kind: str, dtype: torch.dtype) -> None:
    mask = MASKS[kind]
    if mask.keys is not None:
        mask = AttentionMask(keys=mask.keys.to(DEVICE))
    inputs = [x.detach().to(dtype).to(DEVICE) for x in random_inputs()]

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        return AttentionCore(backend="unfused")(*inputs, mask)

    with with_kernels(), torch.profiler.profile() as profile:
        got = run(attend, *inputs)
    assert any(event.key == "megatron::scaled_softmax" for event in profile.key_averages())
    for ours, exact in zip(got, run(attend, *(x.double() for x in inputs)), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=8 * TOLERANCES[dtype])


def flash_by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    key_ends: torch.Tensor,
    longest: int,
    longest_key: int,
    dropout: float,
    causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    """What PyTorch's operator computes, which has no version for the CPU."""
    assert ends.dtype == torch.int32 and torch.equal(ends, key_ends)
    assert longest == longest_key == int(ends.diff().max()) and ends[-1] == len(query)
    parts = []
    for start, end in zip(ends.tolist(), ends[1:].tolist(), strict=False):
        own = [x[start:end].unsqueeze(1) for x in (query, key, value)]
        parts.append(AttentionCore(scale=scale)(*own, AttentionMask(causal=causal)).squeeze(1))
    return (torch.cat(parts).unflatten(1, query.shape[1:]),)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [N, 1])
def test_documents_at_once_equal_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, heads: int, causal: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(9, B, n, D) for n in (N, heads, heads)]
    inputs = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    mask = AttentionMask(causal=causal, document_lengths=torch.tensor([[4, 2, 3], [8, 1, 0]]))
    expected = AttentionCore()(*inputs, mask)
    monkeypatch.setattr("megatron.ops.attention.takes_documents", lambda query, backend: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_by_hand)
    result = AttentionCore()(*inputs, mask)
    torch.testing.assert_close(result, expected)
    for ours, theirs in zip(gradients(result, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    ends = mask.documents.ends_on(torch.device("cpu"))
    assert ends.tolist() == [0, 4, 6, 9, 17, 18]
    assert mask.with_bias(None).documents.ends_on(torch.device("cpu")) is ends


def test_the_best_backend_is_asked_first() -> None:
    order = fused_attention._order
    cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    assert order("auto", False, True)[0] == cudnn
    assert order("auto", False, False)[0] == flash
    assert flash not in order("auto", True, True), "it takes no mask"
    for name in ("flash", "cudnn", "efficient"):
        assert len(order(name, True, True)) == len(order(name, False, False)) == 1


def test_a_backend_that_cannot_says_which_flag_asked_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    with pytest.raises(RuntimeError, match="--attention-backend flash cannot compute"):
        AttentionCore(backend="flash")(*random_inputs(), AttentionMask())
