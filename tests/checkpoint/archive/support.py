"""Random content of archives, how to write, read and change it, and calls in pickles."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.checkpoint.archive import LazyArchive, LazyTensor
from megatron.errors import CheckpointError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(tree: Any, path: Path, zipped: bool) -> Path:
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    return path


def read_all(lazy: Any) -> Any:
    """The tree with its tensors read."""
    if isinstance(lazy, LazyTensor):
        tensor = lazy.read()
        assert tensor.stride() == torch.empty(lazy.shape).stride()
        assert (tuple(tensor.shape), tensor.dtype) == (lazy.shape, lazy.dtype)
        assert tensor.untyped_storage().nbytes() == lazy.num_bytes
        return tensor
    if isinstance(lazy, dict):
        return {key: read_all(value) for key, value in lazy.items()}
    if isinstance(lazy, list | tuple):
        return type(lazy)(read_all(value) for value in lazy)
    if isinstance(lazy, argparse.Namespace):
        return argparse.Namespace(**read_all(vars(lazy)))
    return lazy


def load(path: Path) -> Any:
    with LazyArchive(path) as archive:
        return read_all(archive.tree)


def assert_equal(found: Any, expected: Any) -> None:
    """Equal as the reader promises: tensors and arrays bitwise, dictionaries as plain ones."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert type(found) is dict
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, argparse.Namespace):
        assert_equal(vars(found), vars(expected))
    elif isinstance(expected, list | tuple):
        assert isinstance(expected, type(found))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


class Trees:
    """Random content of a checkpoint."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: list[torch.Tensor] = []

    def tree(self, depth: int) -> Any:
        if depth == 0 or self.rng.random() < 0.2:
            return self.rng.choice([self.tensor, self.tensor, self.value])()
        children = [self.tree(depth - 1) for _ in range(self.rng.randrange(5))]
        names = [f"key.{i}" for i in range(len(children))]
        kind = self.rng.choice([list, tuple, dict, collections.OrderedDict, argparse.Namespace])
        if kind in (list, tuple):
            return kind(children)
        pairs = dict(zip(names, children, strict=True))
        return kind(**pairs) if kind is argparse.Namespace else kind(pairs)

    def tensor(self) -> torch.Tensor:
        if self.tensors and self.rng.random() < 0.3:
            return self.view_of(self.rng.choice(self.tensors))
        shape = [self.rng.randrange(6) for _ in range(self.rng.randrange(4))]
        tensor = 100 * torch.rand(shape, generator=self.generator)
        self.tensors.append(tensor.to(self.rng.choice(DTYPES)))
        return self.view_of(self.tensors[-1])

    def view_of(self, tensor: torch.Tensor) -> torch.Tensor:
        views: list[Callable[[torch.Tensor], torch.Tensor]] = [
            lambda t: t,
            lambda t: t.transpose(0, -1) if t.dim() else t,
            lambda t: t[self.rng.randrange(3) :: self.rng.randrange(1, 3)] if t.dim() else t,
            lambda t: t[..., 1:] if t.dim() else t,
            lambda t: t.unsqueeze(0).expand(3, *t.shape),
            lambda t: t.flatten()[0] if t.numel() else t,
            lambda t: torch.nn.Parameter(t, requires_grad=False),
        ]
        return self.rng.choice(views)(self.rng.choice(views)(tensor))

    def value(self) -> Any:
        values = [None, True, 7, -(2**70), 1.5, "tëxt", b"\x00\xff", b"", 2j, {3, "a"}, frozenset()]
        values += [torch.float16, torch.Size([2, 3]), torch.device("cuda", 1), np.float32(0.1)]
        values += [collections.defaultdict(list, a=[1]), np.arange(6, dtype=">i4").reshape(2, 3)]
        values += [np.asfortranarray(np.ones((2, 3))), np.zeros((0, 2)), np.array(["ab", "c"])]
        return self.rng.choice(values)


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> Path:
    """A copy of an archive with the records that `change` returns."""
    new = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w", **options) as archive:
        for record in old.infolist():
            folder, _, name = record.filename.partition("/")
            data = change(name, old.read(record))
            if data is not None:
                archive.writestr(f"{folder}/{name}", data)
    return new


def problem_with(path: Path) -> str | None:
    """What is wrong with an archive, if it is seen to be."""
    try:
        load(path)
    except CheckpointError as error:
        (problem,) = error.problems
        return problem
    return None


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced

    def __call__(self) -> None:
        """What is called in a pickle has to be callable when it is written."""


class Persistent:
    """Pickles as a persistent id."""

    def __init__(self, pid: Any) -> None:
        self.pid = pid


def dumps_persistent(tree: Any) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.pid if isinstance(obj, Persistent) else None

    Pickler(stream := io.BytesIO(), 2).dump(tree)
    return stream.getvalue()
