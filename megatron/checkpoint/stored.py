"""The tensors of a checkpoint directory, read without trusting it.

torch.distributed.checkpoint (DCP) describes a checkpoint in `.metadata`, a pickle: for each tensor
its global shape and its boxes, for each box its file, offset and length. The data of a box is one
`torch.save` archive. Two things are done here that DCP leaves out:

- The pickle is read by an allow-list of DCP's own metadata classes; anything else in it, which
  could run code, is refused by name. The archives are read with `weights_only`.
- Damage is found and named. Missing and truncated files show before anything is read; a flipped
  bit shows by the checksums that the archives carry and that `torch.load` does not look at.

How saved boxes fill wanted ones is DCP's own planner.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from megatron.checkpoint.sharded import GlobalTensor
from megatron.errors import CheckpointError

_METADATA_FILE = ".metadata"
_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds DCP's metadata classes and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class StoredTensors:
    """The tensors stored in the directory `path`.

    Raises:
        CheckpointError: its description is missing, damaged or holds anything but tensors, or
            names a data file that is missing or too short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata = _read_metadata(path / _METADATA_FILE)
        self._boxes: dict[MetadataIndex, Any] = self._metadata.storage_data
        problems = list(self._file_problems())
        if problems:
            raise CheckpointError(problems)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The global shape of every stored tensor."""
        return {key: tuple(tensor.size) for key, tensor in self._tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The data type of every stored tensor."""
        return {key: tensor.properties.dtype for key, tensor in self._tensors.items()}

    @property
    def _tensors(self) -> Mapping[str, TensorStorageMetadata]:
        return self._metadata.state_dict_metadata  # type: ignore[return-value]

    def read(self, key: str) -> torch.Tensor:
        """One whole global tensor, in this process' memory.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: its data is damaged.
        """
        stored = self._tensors[key]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        self.load({key: GlobalTensor.whole(tensor)})
        return tensor

    def load(self, wanted: Mapping[str, GlobalTensor]) -> None:
        """Fill the pieces of the wanted tensors in place.

        Every key must be stored with the wanted shape; values are converted to the wanted type.

        Raises:
            CheckpointError: data is damaged; a line for each damaged box.
        """
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(wanted), self._metadata, is_coordinator=True)
        plan = planner.finish_plan(planner.create_local_plan())
        problems = []
        for file, boxes in self._by_file(plan.items).items():
            with (self.path / file).open("rb") as stream:
                for index, items in boxes.items():
                    try:
                        self._load_box(stream, index, items, planner)
                    except _DamageError as damage:
                        problems.append(f"{self.path / file}: {_name(index)} is damaged: {damage}")
        if problems:
            raise CheckpointError(problems)

    def _by_file(self, items: list[ReadItem]) -> dict[str, dict[MetadataIndex, list[ReadItem]]]:
        """The reads grouped by file and box, boxes in the file's order, so each is read once."""
        files: dict[str, dict[MetadataIndex, list[ReadItem]]] = defaultdict(dict)
        for item in sorted(items, key=lambda item: self._boxes[item.storage_index].offset):
            boxes = files[self._boxes[item.storage_index].relative_path]
            boxes.setdefault(item.storage_index, []).append(item)
        return files

    def _load_box(
        self,
        stream: io.BufferedReader,
        index: MetadataIndex,
        items: list[ReadItem],
        planner: DefaultLoadPlanner,
    ) -> None:
        box = self._boxes[index]
        stream.seek(box.offset)
        source = _tensor_of(stream.read(box.length))
        stored = self._tensors[index.fqn]
        if (
            source.shape != _chunk_at(stored, index).sizes
            or source.dtype != stored.properties.dtype
        ):
            raise _DamageError(f"found {tuple(source.shape)} of {source.dtype}")
        for item in items:
            part = source[_slices(item.storage_offsets, item.lengths)]
            planner.resolve_tensor(item).copy_(part)

    def _file_problems(self) -> Iterator[str]:
        """A line for each data file that is missing or shorter than the description says."""
        ends: dict[str, int] = defaultdict(int)
        for box in self._boxes.values():
            ends[box.relative_path] = max(ends[box.relative_path], box.offset + box.length)
        for file, end in sorted(ends.items()):
            path = self.path / file
            if not path.is_file():
                yield f"{path} is missing; it holds {self._beyond(file, 0)}"
            elif (size := path.stat().st_size) < end:
                lost = self._beyond(file, size)
                yield f"{path} is truncated: {size} bytes, expected {end}; {lost} is cut off"

    def _beyond(self, file: str, size: int) -> str:
        """The tensors that are lost where a file ends after `size` bytes."""
        first, *more = sorted(
            {
                index.fqn
                for index, box in self._boxes.items()
                if box.relative_path == file and box.offset + box.length > size
            }
        )
        return f"{first} and {len(more)} more" if more else first


class _DamageError(Exception):
    """Why the data of a box cannot be used."""


def _read_metadata(path: Path) -> Metadata:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; without it the tensors cannot be found")
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # damaged, it can fail in any way that a pickle's instructions can
        raise CheckpointError(f"{path} is refused: {error}") from error
    try:
        problem = _problem_of(metadata)
    except (AttributeError, TypeError, ValueError) as error:  # something else than DCP puts there
        problem = f"it describes something else than tensors: {error}"
    if problem:
        raise CheckpointError(f"{path} is refused: {problem}")
    return metadata


def _problem_of(metadata: Any) -> str | None:
    """What is wrong with a description, if anything is."""
    boxes = metadata.storage_data
    for box in boxes.values():
        if box.relative_path != Path(box.relative_path).name or not box.offset >= 0 < box.length:
            return f"it names {box.offset}+{box.length} of {box.relative_path}"
    for key, tensor in metadata.state_dict_metadata.items():
        volume = 0
        for chunk in tensor.chunks:
            ends = (o + n for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            inside = all(end <= size for end, size in zip(ends, tensor.size, strict=True))
            if not inside or MetadataIndex(key, chunk.offsets) not in boxes:
                return f"it holds {tuple(chunk.sizes)} at {tuple(chunk.offsets)} of {key}"
            volume += chunk.sizes.numel()
        if not isinstance(tensor.properties.dtype, torch.dtype):
            return f"it gives {key} no type"
        if volume != tensor.size.numel():
            return f"it holds {volume} of {tensor.size.numel()} values of {key}"
    return None


def _tensor_of(archive: bytes) -> torch.Tensor:
    """The tensor of a `torch.save` archive, after a look at the archive's checksums."""
    broken = None
    try:
        broken = zipfile.ZipFile(io.BytesIO(archive)).testzip()
        if broken is None:
            tensor = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _DamageError("it holds something else than a tensor") from error
    except Exception as error:  # damaged, an archive can fail in any way
        raise _DamageError(f"{error}".partition("\n")[0]) from error
    if broken is not None:
        raise _DamageError(f"bad checksum of {broken}")
    if not isinstance(tensor, torch.Tensor):
        raise _DamageError("it holds something else than a tensor")
    return tensor


def _chunk_at(stored: TensorStorageMetadata, index: MetadataIndex) -> ChunkStorageMetadata:
    return next(chunk for chunk in stored.chunks if chunk.offsets == index.offset)


def _slices(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))


def _name(index: MetadataIndex) -> str:
    return f"{index.fqn} at {tuple(index.offset or ())}"
