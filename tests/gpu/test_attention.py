"""PyTorch's fused attentions on a GPU: whichever computes, the numbers are those of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.ops.attention import AttentionCore, AttentionMask
from megatron.ops.fused_attention import takes_documents
from tests.ops.kernel_cases import relative_error, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda", 0)
S, B, N, D = 136, 2, 4, 64
TOLERANCE = 2e-2  # of values and gradients in bfloat16


def _inputs(heads: int = N, batch: int = B) -> list[Tensor]:
    """Queries, keys and values as they lie in the product that makes them."""
    generator = torch.Generator().manual_seed(8)
    mixed = torch.randn(S, batch, N + 2 * heads, D, generator=generator).bfloat16().to(GPU)
    return list(mixed.split((N, heads, heads), dim=2))


def _assert_equal(core: AttentionCore, mask: AttentionMask, inputs: list[Tensor]) -> None:
    def attend(*inputs: Any) -> Tensor:
        return core(*inputs, mask)

    def plain(*inputs: Any) -> Tensor:
        return AttentionCore(backend="unfused")(*inputs, mask)

    wanted = run(plain, *(x.double() for x in inputs))
    for one, other in zip(run(attend, *inputs), wanted, strict=True):
        assert relative_error(one, other) < TOLERANCE


def _needs_ampere(backend: str) -> None:
    if backend in ("flash", "cudnn") and torch.cuda.get_device_capability(GPU) < (8, 0):
        pytest.skip(f"{backend} needs a GPU of compute capability 8.0")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["auto", "flash", "cudnn", "efficient"])
def test_each_backend_computes_attention(backend: str, causal: bool) -> None:
    _needs_ampere(backend)
    _assert_equal(AttentionCore(backend=backend), AttentionMask(causal=causal), _inputs())


@pytest.mark.parametrize("backend", ["auto", "efficient"])
def test_padding_is_masked(backend: str) -> None:
    keys = torch.arange(S, device=GPU) < torch.tensor([[100], [S]], device=GPU)
    mask = AttentionMask(keys=keys[:, None, None])
    _assert_equal(AttentionCore(backend=backend), mask, _inputs())


def test_heads_share_keys() -> None:
    _assert_equal(AttentionCore(), AttentionMask(causal=True), _inputs(heads=2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [N, 2])
@pytest.mark.parametrize("lengths", [[[36, 100, 0], [1, 71, 64]], [[128, 7, 1]]])
def test_documents_are_attended_in_one_call(
    lengths: list[list[int]], heads: int, causal: bool
) -> None:
    inputs = _inputs(heads, len(lengths))
    _needs_ampere("flash")
    assert takes_documents(inputs[0], "auto")
    mask = AttentionMask(causal=causal, document_lengths=torch.tensor(lengths))
    _assert_equal(AttentionCore(), mask, inputs)


def test_documents_drop_weights_anew_each_time_and_alike_from_the_same_state() -> None:
    _needs_ampere("flash")
    inputs = _inputs()
    mask = AttentionMask(document_lengths=torch.tensor([[36, 100], [70, 66]]))
    core = AttentionCore(dropout=0.5)
    state = torch.cuda.get_rng_state(GPU)
    first, second = core(*inputs, mask), core(*inputs, mask)
    torch.cuda.set_rng_state(state, GPU)
    again = core(*inputs, mask)
    assert torch.equal(first, again) and not torch.equal(first, second)
