"""The attention core: fused or not, with weights or without, the same numbers and gradients."""

from __future__ import annotations

import pytest
import torch

from megatron.ops.attention import AttentionCore, AttentionMask

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
@pytest.mark.parametrize("fused", [True, False])
def test_scores_are_scaled_as_asked(fused: bool, scale: float | None) -> None:
    inputs = random_inputs()
    core = AttentionCore(fused=fused, scale=scale)
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
