"""Archives written tensor by tensor are what every `torch.load` reads."""

from __future__ import annotations

import argparse
import collections
import random
import resource
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.checkpoint.archive import LazyArchive, LazyTensor
from megatron.checkpoint.archive.writer import DeferredTensor, write_archive
from tests.checkpoint.archive.support import Trees, assert_equal, read_all


def deferred(tree: Any, made: list[torch.Tensor]) -> Any:
    """The tree with its tensors deferred; `made` lists them as they are made."""
    if isinstance(tree, torch.Tensor):
        return DeferredTensor(
            tuple(tree.shape),
            tree.dtype,
            lambda: made.append(tree) or tree,  # type: ignore[func-returns-value]
        )
    if isinstance(tree, dict):
        return type(tree)({key: deferred(value, made) for key, value in tree.items()})
    if isinstance(tree, list | tuple) and type(tree) in (list, tuple):
        return type(tree)(deferred(value, made) for value in tree)
    if isinstance(tree, argparse.Namespace):
        return argparse.Namespace(**deferred(vars(tree), made))
    return tree


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree in the order in which they stand in it."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif isinstance(tree, argparse.Namespace):
        tree = vars(tree).values()
    elif type(tree) not in (list, tuple):
        return []
    return [tensor for value in tree for tensor in tensors_of(value)]


class PlainTrees(Trees):
    """Random trees of what `torch.load` reads with `weights_only`."""

    def value(self) -> Any:
        return self.rng.choice([None, True, 7, 1.5, "tëxt", torch.bfloat16, torch.Size([2, 3])])


@pytest.mark.parametrize("seed", range(15))
def test_torch_loads_what_is_written(tmp_path: Path, seed: int) -> None:
    tree = {"args": argparse.Namespace(lr=0.1), "rest": [PlainTrees(seed).tree(4)] * 2}
    made: list[torch.Tensor] = []
    path = tmp_path / "wrîtten.pt"
    write_archive(path, deferred(tree, made))
    assert [id(tensor) for tensor in made] == [id(tensor) for tensor in tensors_of(tree)]
    with torch.serialization.safe_globals([argparse.Namespace]):
        safely = torch.load(path, weights_only=True)
    for found in (safely, torch.load(path, weights_only=False)):
        for one, other in zip(tensors_of(found), tensors_of(tree), strict=True):
            assert one.stride() == torch.empty(other.shape).stride()
            assert_equal(one, other)
    assert_equal(plain(safely), tree)
    with LazyArchive(path) as archive:
        assert_equal(read_all(archive.tree), tree)
    assert zipfile.ZipFile(path).testzip() is None


def plain(tree: Any) -> Any:
    """The tree with plain dictionaries, as `LazyArchive` gives them."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(plain(value) for value in tree)
    if isinstance(tree, argparse.Namespace):
        return argparse.Namespace(**plain(vars(tree)))
    return tree


def test_it_is_pickled_as_torch_does(tmp_path: Path) -> None:
    """Old versions know what `torch.save` has written ever since: names, protocol, layout."""
    shapes: list[tuple[int, ...]] = [(2, 3), (), (0, 4)]
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    tree = collections.OrderedDict(
        (f"{dtype} {shape}", torch.ones(shape, dtype=dtype)) for dtype in dtypes for shape in shapes
    )
    write_archive(tmp_path / "ours.pt", deferred(tree, []))
    torch.save(tree, tmp_path / "torch.pt")
    with (
        zipfile.ZipFile(tmp_path / "ours.pt") as ours,
        zipfile.ZipFile(tmp_path / "torch.pt") as theirs,
    ):
        records = ["data.pkl", "byteorder", *(f"data/{i}" for i in range(len(tree)))]
        for record in records:
            assert ours.read(f"archive/{record}") == theirs.read(f"torch/{record}"), record


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    arrays: list[weakref.ref[np.ndarray[Any, Any]]] = []  # an array lives as long as its storage

    def make() -> torch.Tensor:
        assert not any(array() is not None for array in arrays)
        array = np.ones(100, dtype=np.float32)
        arrays.append(weakref.ref(array))
        return torch.from_numpy(array)

    told: list[int] = []
    tree = {f"{i}": DeferredTensor((100,), torch.float32, make) for i in range(20)}
    write_archive(tmp_path / "held.pt", tree, on_bytes=told.append)
    assert [array() for array in arrays] == [None] * 20
    assert told == [400 * (i + 1) for i in range(20)]
    assert sum(tensor.num_bytes for tensor in tree.values()) == told[-1]


def test_only_the_tensor_of_a_larger_storage_is_written(tmp_path: Path) -> None:
    large = torch.arange(100_000.0)
    parts = {"part": DeferredTensor.of(large[1000:1010]), "every other": large[::2][:5]}
    write_archive(tmp_path / "parts.pt", parts)
    assert (tmp_path / "parts.pt").stat().st_size < 4000
    found = torch.load(tmp_path / "parts.pt", weights_only=True)
    assert_equal(found, {"part": large[1000:1010], "every other": large[:10:2]})


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise RuntimeError("no more")

    path = tmp_path / "kept.pt"
    write_archive(path, {"a": torch.ones(1)})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="no more"):
        write_archive(path, {"a": torch.ones(1), "b": DeferredTensor((1,), torch.half, fail)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    tensors = [torch.ones(25_000) for _ in range(4)]
    write_archive(path, tensors)
    size = path.stat().st_size
    path.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (60_000, 200_000, size - 100):  # in a tensor, and behind the last
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large: '.*large.pt'"):
                write_archive(path, tensors)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == []


def test_a_tensor_unlike_the_promised_is_a_fault(tmp_path: Path) -> None:
    for wrong in (torch.ones(2), torch.ones(1).half()):
        promise = DeferredTensor((1,), torch.float32, lambda wrong=wrong: wrong)  # type: ignore[misc]
        with pytest.raises(AssertionError):
            write_archive(tmp_path / "wrong.pt", {"a": promise})


def test_what_was_read_is_written_lazily(tmp_path: Path) -> None:
    """From one file to the other without a tensor that stays in memory."""
    rng = random.Random(3)
    tree = {f"{i}": torch.full((rng.randrange(5), 3), i) for i in range(10)}
    torch.save(tree, tmp_path / "from.pt", _use_new_zipfile_serialization=False)
    with LazyArchive(tmp_path / "from.pt") as archive:
        tensors: dict[str, LazyTensor] = archive.tree
        copied = {k: DeferredTensor(t.shape, t.dtype, t.read) for k, t in tensors.items()}
        write_archive(tmp_path / "to.pt", copied)
    assert_equal(torch.load(tmp_path / "to.pt", weights_only=True), tree)
