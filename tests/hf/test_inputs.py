"""What is given to `forward`: masks, with and without a look at their values."""

from __future__ import annotations

import torch

from megatron.hf.inputs import masked
from megatron.ops.attention import AttentionCore

B, N, S, D = 2, 3, 5, 4


def attend(mask_of: torch.Tensor, can_look: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What attention makes under a mask, [s, b, n d], and its gradient of query, key and value."""
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(S, B, N, D, generator=generator).requires_grad_() for _ in range(3)]
    result = AttentionCore()(*inputs, masked(mask_of, can_look=can_look))
    return result, list(torch.autograd.grad(result.square().sum(), inputs))


def test_without_a_look_only_queries_that_see_nothing_differ() -> None:
    seen = torch.ones(B, 1, S, S)
    seen[0, :, :, 3:] = 0
    looked, gradients = attend(seen, can_look=True)
    blind, blind_gradients = attend(seen, can_look=False)
    torch.testing.assert_close(blind, looked)
    for ours, theirs in zip(blind_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)

    seen[1, :, 2] = 0
    looked, _ = attend(seen, can_look=True)
    blind, blind_gradients = attend(seen, can_look=False)
    sees = torch.ones(S, B, dtype=torch.bool)
    sees[2, 1] = False
    torch.testing.assert_close(blind[sees], looked[sees])
    # That one sees all, and its gradient is that of a query which does.
    seen[1, :, 2] = 1
    all_seen, gradients = attend(seen, can_look=True)
    torch.testing.assert_close(blind, all_seen)
    for ours, theirs in zip(blind_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_is_added_where_all_is_seen() -> None:
    assert masked(torch.ones(B, 1, 1, S), can_look=True).bias is None
    blind = masked(torch.ones(B, 1, 1, S), can_look=False).bias
    assert blind is not None
    assert blind.count_nonzero() == 0
