"""Write tensors as safetensors files, holding one tensor in memory at a time.

A file is a length, a JSON header with the type, shape and place of each tensor, and the tensors'
bytes. Since shapes are known before any value is, the header can be written first. A large model
becomes several files and an index that says which holds what, as `transformers` expects it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

INDEX_FILE = "model.safetensors.index.json"
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorPlan:
    """Name, shape and type of a tensor to come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    directory: Path,
    plans: Sequence[TensorPlan],
    tensors: Iterable[torch.Tensor],
    *,
    max_bytes: int,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> list[Path]:
    """Write the tensors, which come in the order of `plans`, in files of at most `max_bytes`.

    A single tensor may exceed `max_bytes`. `on_bytes` is told how many bytes of tensors have been
    written so far. Returns the files written.
    """
    shards = list(shards_of(plans, max_bytes))
    names = file_names("model", "safetensors", len(shards))
    stream = iter(tensors)
    count = 0
    for name, shard in zip(names, shards, strict=True):
        for size in _write_file(directory / name, shard, stream):
            count += size
            on_bytes(count)
    if len(shards) > 1:
        write_index(directory / INDEX_FILE, dict(zip(names, shards, strict=True)))
    return [directory / name for name in names]


def shards_of(plans: Sequence[TensorPlan], max_bytes: int) -> Iterator[list[TensorPlan]]:
    """Runs of tensors of at most so many bytes; one that is larger stands alone."""
    shard: list[TensorPlan] = []
    size = 0
    for plan in plans:
        if shard and size + plan.num_bytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(plan)
        size += plan.num_bytes
    yield shard


def file_names(stem: str, suffix: str, count: int) -> list[str]:
    """What `transformers` calls the weight files of a model that has so many."""
    if count == 1:
        return [f"{stem}.{suffix}"]
    return [f"{stem}-{n:05d}-of-{count:05d}.{suffix}" for n in range(1, count + 1)]


def _write_file(
    path: Path, plans: list[TensorPlan], tensors: Iterator[torch.Tensor]
) -> Iterator[int]:
    """Write one file, saying the size of each tensor behind it."""
    with path.open("wb") as file:
        file.write(_header(plans))
        for plan in plans:
            tensor = next(tensors)
            assert (tensor.shape, tensor.dtype) == (plan.shape, plan.dtype), plan.name
            # A tensor of one element may be contiguous with any stride, and then is no bytes.
            flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
            file.write(flat.view(torch.uint8).numpy().data)
            yield plan.num_bytes


def _header(plans: list[TensorPlan]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        end = offset + plan.num_bytes
        header[plan.name] = {
            "dtype": _TYPES[plan.dtype],
            "shape": plan.shape,
            "data_offsets": (offset, end),
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_index(path: Path, files: dict[str, list[TensorPlan]]) -> None:
    """Write which of several files holds which tensor."""
    total = sum(plan.num_bytes for plans in files.values() for plan in plans)
    weight_map = {plan.name: file for file, plans in files.items() for plan in plans}
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
