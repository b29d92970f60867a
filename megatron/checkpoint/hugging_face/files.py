"""The weights of a Hugging Face model directory, whatever files they are in.

    model.safetensors                    one file, or
    model.safetensors.index.json         an index that says which of several files holds a tensor
    pytorch_model.bin                    the same, written by `torch.save`
    pytorch_model.bin.index.json

The first that is there is taken. The oldest files call the weight and bias of a LayerNorm `gamma`
and `beta`; here they have their present names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from megatron.checkpoint.archive import LazyArchive, LazyTensor
from megatron.errors import CheckpointError, ConfigError

_SAFETENSORS = "model.safetensors"
_PICKLED = "pytorch_model.bin"
_NAMES = (_SAFETENSORS, f"{_SAFETENSORS}.index.json", _PICKLED, f"{_PICKLED}.index.json")
_PRESENT = {"gamma": "weight", "beta": "bias"}
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class HuggingFaceFiles:
    """The tensors of the model in `directory`; to be closed, or used in a `with` statement.

    Raises:
        CheckpointError: there are no weights, or a file is missing, damaged, or not what the index
            says.
        ConfigError: the weights are safetensors and that package is not installed.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    def __init__(self, directory: Path) -> None:
        self._files: list[_File] = []
        try:
            found = self._open(directory)
        except BaseException:
            self.close()
            raise
        self._places = {name: (file, theirs) for name, file, theirs in found}
        self.shapes = {name: file.shapes[theirs] for name, file, theirs in found}
        self.dtypes = {name: file.dtypes[theirs] for name, file, theirs in found}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in this process' memory.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: its data is damaged.
        """
        file, theirs = self._places[name]
        return file.read(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; their tensors cannot be read any more."""
        for file in self._files:
            file.close()

    def _open(self, directory: Path) -> list[tuple[str, _File, str]]:
        """Every tensor: its name, its file, and its name there."""
        path = _weights_in(directory)
        kind = _SafetensorsFile if path.name.startswith(_SAFETENSORS) else _PickledFile
        index = _index(path) if path.suffix == ".json" else None
        found: dict[str, tuple[str, _File, str]] = {}
        for file_name in dict.fromkeys([path.name] if index is None else index.values()):
            file = kind(directory / file_name)
            self._files.append(file)
            listed = [name for name, where in (index or {}).items() if where == file_name]
            for theirs in file.shapes if index is None else listed:
                if theirs not in file.shapes:
                    raise CheckpointError(f"{file.path} lacks {theirs}, which {path} says it holds")
                name = _present_name(theirs)
                if name in found:
                    raise CheckpointError(f"{path} holds {name} twice, once as {theirs}")
                found[name] = (name, file, theirs)
        return list(found.values())


class _File(Protocol):
    """One file of weights."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> torch.Tensor: ...

    def close(self) -> None: ...


class _PickledFile:
    """A file that `torch.save` wrote: a dictionary of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive = LazyArchive(path)
        tensors = self._archive.tree
        if not isinstance(tensors, dict):
            raise self._stranger(f"a {type(tensors).__name__}")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, LazyTensor):
                raise self._stranger(f"{name}, a {type(tensor).__name__}")
        self._tensors: dict[str, LazyTensor] = tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].read()

    def close(self) -> None:
        self._archive.close()

    def _stranger(self, what: str) -> CheckpointError:
        self.close()
        return CheckpointError(f"{self.path} holds {what}, expected named tensors and nothing else")


class _SafetensorsFile:
    """A safetensors file, opened for each tensor: what has been read of it stays mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._library = _safetensors(path)
        try:
            with self._opened() as file:
                for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                    part = file.get_slice(name)
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = _TYPES[part.get_dtype()]
        except self._problems as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        except KeyError as error:
            raise CheckpointError(
                f"{path}: {name} is of type {error}, which is not known"
            ) from None

    def read(self, name: str) -> torch.Tensor:
        try:
            with self._opened() as file:
                return file.get_tensor(name)
        except self._problems as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error

    def close(self) -> None:
        """Nothing stays open."""

    @property
    def _problems(self) -> tuple[type[Exception], ...]:
        return self._library.SafetensorError, OSError

    def _opened(self) -> Any:
        return self._library.safe_open(self.path, framework="pt")


def _safetensors(path: Path) -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ConfigError(
            f"{path} needs the package safetensors, which is not installed: pip install safetensors"
        ) from error
    return safetensors


def _weights_in(directory: Path) -> Path:
    for name in _NAMES:
        if (directory / name).is_file():
            return directory / name
    raise CheckpointError(f"{directory} holds no weights; expected one of {', '.join(_NAMES)}")


def _index(path: Path) -> dict[str, str]:
    """Which file holds a tensor, of all tensors."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        beside = all(Path(file).name == file for file in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if not beside:
        raise CheckpointError(f"{path} names files outside its directory")
    if missing := _missing(path.parent, files.values()):
        raise CheckpointError(f"{path} names {', '.join(missing)}, which is missing")
    return files


def _missing(directory: Path, files: Iterable[str]) -> list[str]:
    return [file for file in dict.fromkeys(files) if not (directory / file).is_file()]


def _present_name(name: str) -> str:
    rest, dot, last = name.rpartition(".")
    return f"{rest}{dot}{_PRESENT.get(last, last)}"
