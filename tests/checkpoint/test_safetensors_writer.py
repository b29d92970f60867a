"""Files written tensor by tensor are what the safetensors library reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.safetensors_writer import INDEX_FILE, TensorPlan, write_safetensors

safetensors = pytest.importorskip("safetensors.torch")

TENSORS = {
    "a": torch.randn(3, 5),
    "b.weight": torch.randn(4, 4).t().to(torch.bfloat16),
    "c": torch.randn(7).half()[::2],
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize(("max_bytes", "count"), [(10**9, 1), (70, 2), (1, 5)])
def test_the_library_reads_what_is_written(tmp_path: Path, max_bytes: int, count: int) -> None:
    plans = [TensorPlan(name, tuple(t.shape), t.dtype) for name, t in TENSORS.items()]
    files = write_safetensors(tmp_path, plans, iter(TENSORS.values()), max_bytes=max_bytes)
    assert len(files) == count
    found = {}
    for file in files:
        for name, tensor in safetensors.load_file(file).items():
            found[name] = (file.name, tensor)
    assert {n: t.dtype for n, (_, t) in found.items()} == {n: t.dtype for n, t in TENSORS.items()}
    assert all(torch.equal(tensor, TENSORS[name]) for name, (_, tensor) in found.items())
    if count > 1:
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())


def test_a_single_element_of_any_stride_is_written(tmp_path: Path) -> None:
    element = torch.arange(6.0).view(2, 3)[1:, 1:2].t()  # contiguous, with a stride of 3
    plan = TensorPlan("element", (1, 1), torch.float32)
    write_safetensors(tmp_path, [plan], [element], max_bytes=100)
    from safetensors.torch import load_file

    assert load_file(tmp_path / "model.safetensors")["element"].item() == 4.0
