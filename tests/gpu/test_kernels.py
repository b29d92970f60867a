"""What only a GPU can show of the kernels: tensors too large for 32-bit places, graphs, streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.contests import backward_action, difference, forward_action
from benchmarks.gpu.kernels import CASES, Case, Draw
from megatron.ops import kernels
from megatron.ops.cross_entropy import row_losses
from megatron.ops.mlp import bias_activation
from megatron.ops.norm import layer_norm
from megatron.ops.softmax import scaled_softmax

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
MANY = 2**31 + 2**20  # elements, 4.3 GB in half precision

# Each takes rows [n, h] and is the same row by row.
BY_ROWS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "bias_activation": (2048, lambda x: bias_activation(x, None, "gelu", gated=False)),
    "layer_norm": (2048, lambda x: layer_norm(x, torch.ones_like(x[0]), x[0] * 0, 1e-5)),
    "softmax": (4096, lambda x: scaled_softmax(x[None, None])[0, 0]),
    "cross_entropy": (
        32768,
        lambda x: row_losses(x, torch.full((len(x),), 7, device=DEVICE), 0, x.size(1))[0],
    ),
}


@pytest.mark.parametrize("name", BY_ROWS)
def test_places_do_not_overflow(name: str) -> None:
    width, function = BY_ROWS[name]
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("the GPU has less than 12 GiB free")
    rows = MANY // width
    x = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE)
    for piece in (x[:3], x[rows // 2 : rows // 2 + 3], x[-3:]):
        piece.normal_()
    with kernels.using("cuda", DEVICE), torch.no_grad():
        whole = function(x)
        for rows_of in (slice(0, 3), slice(rows // 2, rows // 2 + 3), slice(rows - 3, rows)):
            torch.testing.assert_close(whole[rows_of], function(x[rows_of].clone()))


@pytest.mark.parametrize("case", [case for case in CASES if case.comparable], ids=lambda c: c.name)
def test_a_replayed_graph_computes_what_the_calls_compute(case: Case) -> None:
    with kernels.using("cuda", DEVICE), torch.no_grad():
        inputs = case.draw(Draw(DEVICE, tiny=0))
        for _ in range(2):
            wanted = case.ours(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = case.ours(*inputs)
        graph.replay()
        torch.cuda.synchronize()
        assert difference(found, wanted) == 0.0


@pytest.mark.parametrize("case", [case for case in CASES if case.comparable], ids=lambda c: c.name)
def test_kernels_run_on_the_current_stream(case: Case) -> None:
    # What the other stream does before takes so long that another one would overtake it.
    with kernels.using("cuda", DEVICE), torch.no_grad():
        first, second = (case.draw(Draw(DEVICE, tiny=0)) for _ in range(2))
        for one, other in zip(_tensors(first), _tensors(second), strict=True):
            other.copy_(one)
        late = [x.clone() for x in _tensors(second)]
        for x in _tensors(second):
            x.zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2**24)
            for x, value in zip(_tensors(second), late, strict=True):
                x.copy_(value)
            on_stream = case.ours(*second)
        stream.synchronize()
        assert difference(on_stream, case.ours(*first)) == 0.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_never_make_the_host_wait(case: Case) -> None:
    with kernels.using("cuda", DEVICE):
        for tiny, (back, action) in product((0, 1), enumerate((forward_action, backward_action))):
            if back and case.moved_back is None:
                continue
            call: Callable[[], Any] = action(case.ours, case.draw(Draw(DEVICE, tiny=tiny)))
            call()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def _tensors(inputs: Any) -> list[Tensor]:
    """All tensors of the inputs, those of 8 bits as whole numbers."""
    if isinstance(inputs, Tensor):
        return [inputs.view(torch.uint8) if inputs.dtype == torch.float8_e4m3fn else inputs]
    return [x for each in inputs for x in _tensors(each)] if isinstance(inputs, Sequence) else []
