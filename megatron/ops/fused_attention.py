"""PyTorch's fused attentions on a GPU: which of them is asked, and for documents laid in a row.

    flash      FlashAttention; half precision, no mask but the causal one
    cudnn      cuDNN's; half precision, the fastest there is on Hopper and newer
    efficient  Memory-efficient attention; any precision and mask

On the CPU there is one, and PyTorch takes it where it can.

Queries come as [b, n, s, d] with the memory of [s, b, n, d]. cuDNN's result has the layout of the
queries, and FlashAttention's that of its own view of them, [b, s, n, d], with the same order in
memory; so [s, b, n d] is a view of either. The efficient one lays its result out as [b, s, n, d].

Letters: s sequence, z sequence of the keys, b micro-batch, n heads, g heads of keys and values,
d head size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.ops.planned import device_type

_BY_NAME = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

_HALF = (torch.float16, torch.bfloat16)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    causal: bool,
    scale: float | None,
    backend: str,
    new_shapes: bool = False,
) -> Tensor:
    """[b, n, s, d], [b, g, z, d] twice -> [b, n, s, d]; g divides n.

    Args:
        mask: bool, True where a key may be seen, or numbers to add to the scores; broadcasts to
            [b, n, s, z]. None with `causal`.
        backend: "auto", or the only one that may compute on a GPU.
        new_shapes: whether the next call will have other shapes, for each of which cuDNN plans.

    Raises:
        RuntimeError: the backend cannot compute this.
    """
    if query.is_meta:
        return _planned(query, key, value, mask, dropout, causal, scale)
    order = (
        nullcontext()
        if query.device.type != "cuda"
        else _asking(backend, query, mask is not None, dropout > 0.0 or new_shapes)
    )
    try:
        with order:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                mask,
                dropout_p=dropout,
                is_causal=causal,
                scale=scale,
                enable_gqa=key.size(1) != query.size(1),
            )
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise RuntimeError(
            f"--attention-backend {backend} cannot compute attention of {query.dtype} "
            f"{list(query.shape)}{' with a mask' if mask is not None else ''}: use auto"
        ) from error


def _asking(
    backend: str, query: Tensor, masked: bool, by_flash_rather: bool
) -> AbstractContextManager[object]:
    """Within it PyTorch takes the first that can compute, of those that may."""
    prefers_cudnn = query.dtype in _HALF and _generation(query.device) >= 9 and not by_flash_rather
    return sdpa_kernel(_order(backend, masked, prefers_cudnn), set_priority=True)


@cache
def _order(backend: str, masked: bool, prefers_cudnn: bool) -> list[SDPBackend]:
    if backend != "auto":
        return [_BY_NAME[backend]]
    flash, cudnn, efficient = _BY_NAME.values()
    if masked:
        return [efficient, cudnn, SDPBackend.MATH]
    first = [cudnn, flash, efficient] if prefers_cudnn else [flash, efficient, cudnn]
    return [*first, SDPBackend.MATH]


def _planned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """The operator that a device planned for would be asked for; PyTorch itself takes another.

    The GPU's implementations hold the same for the backward pass. Two operators stand for them.
    """
    if mask is not None:
        mask = mask.to(query.dtype) if mask.dtype == torch.bool else mask
    on_cpu = device_type(query) == "cpu"
    by_flash = mask is None and query.dtype in _HALF and not on_cpu
    shared = query.size(1) // key.size(1)
    if shared > 1 and not (by_flash or on_cpu):
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    aten = torch.ops.aten
    if on_cpu and mask is not None and mask.requires_grad:
        # The CPU's fused one knows no gradient of the mask.
        found = aten._scaled_dot_product_attention_math(
            query, key, value, mask, dropout, causal, scale=scale, enable_gqa=shared > 1
        )
    elif on_cpu:
        found = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout, causal, attn_mask=mask, scale=scale
        )
    elif by_flash:
        found = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout, causal, False, scale=scale
        )
    else:
        if mask is not None:
            mask = mask.expand(*query.shape[:3], key.size(2))
        found = aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, dropout, causal, scale=scale
        )
    context = found[0]
    assert isinstance(context, Tensor)
    return context


@cache
def _generation(device: torch.device) -> int:
    """The first number of the compute capability."""
    return torch.cuda.get_device_capability(device)[0]


class Documents:
    """Where each document of a micro-batch ends, on the host and, once needed, on the device.

    Args:
        lengths: i64[b, m], the lengths of the documents that make up each row, filled up with
            zeros.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self._on_device: Tensor | None = None

    @cached_property
    def longest(self) -> int:
        """The length of the longest document."""
        return int(self.lengths.max())

    def ends_on(self, device: torch.device) -> Tensor:
        """i32[documents + 1]: 0, and where each document ends, the rows laid one behind the other.

        It is sent once, though all layers ask for it.
        """
        if self._on_device is None or self._on_device.device != device:
            lengths = self.lengths.flatten()
            ends = F.pad(lengths[lengths > 0].cumsum(0), (1, 0)).to(torch.int32)
            if device.type == "cuda":
                ends = ends.pin_memory()
            self._on_device = ends.to(device, non_blocking=True)
        return self._on_device


def takes_documents(query: Tensor, backend: str) -> bool:
    """Whether `document_attention` can compute with such queries [s, b, n, d].

    A GPU that a run is only planned for is taken for one of today.
    """
    return (
        backend in ("auto", "flash")
        and device_type(query) == "cuda"
        and query.dtype in _HALF
        and query.size(3) % 8 == 0
        and query.size(3) <= 256
        and (query.is_meta or torch.backends.cuda.is_flash_attention_available())
        and (query.is_meta or _generation(query.device) >= 8)
    )


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    *,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Attention within each document, all of them in one call.

    [s, b, n, d], [s, b, g, d] twice -> [s, b, n, d]; g divides n.
    """
    length, batch = query.shape[:2]
    ends, longest = documents.ends_on(query.device), documents.longest
    # One row behind the other; with a single row this is a view.
    query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
    # The operator behind `torch.nn.attention.varlen`, which knows no dropout.
    context = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        dropout,
        causal,
        False,
        scale=scale,
    )[0]
    context = context.unflatten(0, (batch, length)).transpose(0, 1)
    assert isinstance(context, Tensor)
    return context
