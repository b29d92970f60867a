"""`torch.save` files are read as `torch.load` reads them, and lazily; damage is named."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import random
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.checkpoint.archive import LazyArchive
from megatron.errors import CheckpointError
from tests.checkpoint.archive.support import (
    FORMATS,
    Call,
    Persistent,
    Trees,
    assert_equal,
    dumps_persistent,
    load,
    read_all,
    rewritten,
    save,
)


@FORMATS
@pytest.mark.parametrize("seed", range(25))
def test_any_tree_is_read_as_torch_reads_it(tmp_path: Path, seed: int, zipped: bool) -> None:
    tree = [Trees(100 * seed + i).tree(4) for i in range(3)]
    path = save(tree, tmp_path / "tree.pt", zipped)
    assert_equal(load(path), torch.load(path, weights_only=False, map_location="cpu"))


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_any_protocol_is_read(tmp_path: Path, protocol: int, zipped: bool) -> None:
    tree = {f"{i}": Trees(i).tree(3) for i in range(100)} | {"sets": [{1, 2}, frozenset([3])]}
    path = tmp_path / "tree.pt"
    torch.save(tree, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert_equal(load(path), torch.load(path, weights_only=False, map_location="cpu"))


@FORMATS
def test_arguments_are_read_however_they_were_held(tmp_path: Path, zipped: bool) -> None:
    values = {"num_layers": 24, "params_dtype": torch.float16}
    tree = {"args": types.SimpleNamespace(**values)}
    assert load(save(tree, tmp_path / "args.pt", zipped)) == {"args": argparse.Namespace(**values)}


@FORMATS
def test_random_states_and_attributes_are_read(tmp_path: Path, zipped: bool) -> None:
    weight = torch.nn.Parameter(torch.randn(3))
    weight.partition_dim = 0  # type: ignore[attr-defined]
    master = torch.randn(3)
    master.shared = True  # type: ignore[attr-defined]
    module = torch.nn.Linear(2, 2).state_dict()  # carries an attribute
    states = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
    tree = {"weight": weight, "master": master, "module": module, "states": states}
    found = load(save(tree, tmp_path / "states.pt", zipped))
    random.setstate(found["states"][0])
    np.random.set_state(found["states"][1])
    assert_equal(found, {**tree, "weight": weight.data})


def test_content_of_older_versions_is_read(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    path = save({"a": tensor.view(2, 3)}, tmp_path / "new.pt", zipped=True)
    kept = ("data.pkl", "data/0", "version")
    old = rewritten(path, lambda name, data: data if name in kept else None)
    assert_equal(load(old), {"a": tensor.view(2, 3)})
    # Until 1.6 a view was a storage of its own, described by the storage that it is a part of.
    view = ("view", 2, 3)
    pickled = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    stream = b"".join(pickle.dumps(each, 2) for each in pickled)
    record = ("storage", torch.FloatStorage, "root", "cpu", 6, view)
    arguments = (Persistent(record), 1, (2,), (1,), False, collections.OrderedDict())
    stream += dumps_persistent({"part": Call(torch._utils._rebuild_tensor_v2, *arguments)})
    stream += pickle.dumps(["root"], 2) + (6).to_bytes(8, "little") + tensor.numpy().tobytes()
    old.write_bytes(stream)
    assert_equal(load(old), {"part": tensor[3:5]})
    assert_equal(torch.load(old, weights_only=False), {"part": tensor[3:5]})


def problem_with(path: Path) -> str | None:
    """What is wrong with an archive, if it is seen to be."""
    try:
        load(path)
    except CheckpointError as error:
        (problem,) = error.problems
        return problem
    return None


@FORMATS
@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere_is_an_error_of_one_line(tmp_path: Path, seed: int, zipped: bool) -> None:
    rng = random.Random(seed)
    tree = {f"{i}": Trees(i + 1000 * seed).tree(2) for i in range(60)}
    whole = save(tree, tmp_path / "whole.pt", zipped).read_bytes()
    path = tmp_path / "damaged.pt"
    caught = 0
    for _ in range(80):
        damaged = bytearray(whole)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(rng.choice([1, 1, 20])):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        problem = problem_with(path)
        assert problem is None or problem.startswith(str(path))
        assert problem is None or problem.isprintable()
        caught += problem is not None
    assert caught > 20


def test_a_flipped_bit_of_a_storage_is_found(tmp_path: Path) -> None:
    tree = {"a": torch.ones(1000), "weight": torch.full((1000,), 2.0)}
    path = save(tree, tmp_path / "flipped.pt", zipped=True)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((5,), 2.0).numpy().tobytes()) + 402] ^= 1
    path.write_bytes(content)
    with LazyArchive(path) as archive:
        assert_equal(archive.tree["a"].read(), tree["a"])
        with pytest.raises(CheckpointError, match=r"flipped.pt: weight is damaged: bad checksum"):
            archive.tree["weight"].read()


@FORMATS
def test_a_truncated_file_is_named_as_such(tmp_path: Path, zipped: bool) -> None:
    tree = {name: torch.full((300,), i + 2.0) for i, name in enumerate("abc")}
    path = save(tree, tmp_path / "cut.pt", zipped)
    whole = path.read_bytes()
    place = whole.index(tree["b"].numpy().tobytes())
    for end in (place + 1000, place - 4, place, len(whole) - 1):
        path.write_bytes(whole[:end])
        lost = r"[abc] is damaged: the file ends after"
        problem = "damaged: truncated after" if zipped else lost
        with pytest.raises(CheckpointError, match=rf"cut.pt.* {problem} {end} bytes"):
            LazyArchive(path)


@FORMATS
def test_lost_and_wrong_storages_are_named(tmp_path: Path, zipped: bool) -> None:
    path = save({"weight": torch.arange(100.0)}, tmp_path / "whole.pt", zipped)
    if not zipped:
        whole = path.read_bytes()
        path.write_bytes(whole[:-8])
        with pytest.raises(CheckpointError, match=r"weight is damaged: the file ends after"):
            LazyArchive(path)
        place = whole.index((100).to_bytes(8, "little"))
        path.write_bytes(whole[:place] + (99).to_bytes(8, "little") + whole[place + 8 : -4])
        with pytest.raises(CheckpointError, match=r"weight .* 396 bytes, expected 400"):
            LazyArchive(path)
        return
    lost = rewritten(path, lambda name, data: None if name == "data/0" else data)
    with pytest.raises(CheckpointError, match=r"weight is damaged: storage 0 is missing"):
        LazyArchive(lost)
    short = rewritten(path, lambda name, data: data[:-4] if name == "data/0" else data)
    with pytest.raises(CheckpointError, match=r"weight .* 396 bytes, expected 400"):
        LazyArchive(short)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent.pt cannot be opened: No such file"):
        LazyArchive(tmp_path / "absent.pt")
    path = tmp_path / "other.pt"
    path.write_bytes(b"some text")
    with pytest.raises(CheckpointError, match=r"other.pt is refused: torch.save did not"):
        LazyArchive(path)
    path.write_bytes(pickle.dumps({"a": 1}, 2) * 3)
    with pytest.raises(CheckpointError, match=r"other.pt is refused: torch.save did not"):
        LazyArchive(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("release/mp_rank_00/model_optim_rng.pt", b"")
    with pytest.raises(CheckpointError, match=r"it holds release/mp_rank_00/model_optim_rng.pt"):
        LazyArchive(path)


@FORMATS
def test_big_endian_files_are_refused(tmp_path: Path, zipped: bool) -> None:
    path = save({"a": torch.ones(2)}, tmp_path / "big.pt", zipped)
    if zipped:
        path = rewritten(path, lambda name, data: b"big" if name == "byteorder" else data)
    else:
        pickled = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}, {}, []]
        path.write_bytes(b"".join(pickle.dumps(each, 2) for each in pickled))
    with pytest.raises(CheckpointError, match="big-endian"):
        LazyArchive(path)


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    path = save({"a": torch.ones(200)}, tmp_path / "plain.pt", zipped=True)
    packed = rewritten(path, lambda _, data: data, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        LazyArchive(packed)


# Laziness, and archives in archives.


class CountingFile(io.FileIO):
    """A file that counts the bytes read from it."""

    count = 0

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        CountingFile.count += count or 0
        return count

    def read(self, size: int | None = -1) -> bytes | None:  # type: ignore[override]
        data = super().read(-1 if size is None else size)
        CountingFile.count += len(data or b"")
        return data


@FORMATS
@pytest.mark.parametrize("inside", [False, True])
def test_a_tensor_is_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, inside: bool
) -> None:
    large = torch.randn(20, 100_000)
    tree = {"large": large, "row": large[3], "part": large[5, 10:20], "small": torch.arange(3)}
    path = save(tree, tmp_path / "large.pt", zipped)
    member = None
    if inside:
        member = "release/large.pt"
        with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
            archive.write(path, member)
        path = tmp_path / "outer.zip"
    monkeypatch.setattr(Path, "open", lambda self, mode, buffering: CountingFile(self, mode))
    CountingFile.count = 0
    with LazyArchive.open(path, member) as archive:
        assert 0 < CountingFile.count < 300_000
        for name, size in [("small", 24), ("part", 40), ("row", 400_000), ("large", 8_000_000)]:
            CountingFile.count = 0
            assert_equal(archive.tree[name].read(), tree[name])
            assert CountingFile.count == size


@FORMATS
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_of_an_archive_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, compression: int
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    tree = Trees(5).tree(4)
    path = save(tree, tmp_path / "inner.pt", zipped)
    member = "release/mp_rank_00/model_optim_rng.pt"
    with zipfile.ZipFile(tmp_path / "outer.zip", "w", compression) as outer:
        outer.writestr("release/note.txt", "first " * 1000)
        outer.write(path, member)
    with LazyArchive.open(tmp_path / "outer.zip", member) as archive:
        found = read_all(archive.tree)
    assert_equal(found, torch.load(path, weights_only=False, map_location="cpu"))
    assert list((tmp_path / "temporary").iterdir()) == []
    with pytest.raises(CheckpointError, match=r"outer.zip is refused: .* no absent in it, only"):
        LazyArchive.open(tmp_path / "outer.zip", "absent")


def test_damage_in_a_member_names_archive_and_member(tmp_path: Path) -> None:
    path = save({"weight": torch.ones(1000)}, tmp_path / "inner.pt", zipped=False)
    inner = path.read_bytes()
    with zipfile.ZipFile(tmp_path / "outer.zip", "w", zipfile.ZIP_DEFLATED) as outer:
        outer.writestr("short.pt", inner[:-100])
        outer.writestr("flipped.pt", inner)
    with pytest.raises(CheckpointError, match=r"outer.zip \(short.pt\): weight is damaged"):
        LazyArchive.open(tmp_path / "outer.zip", "short.pt")
    content = bytearray((tmp_path / "outer.zip").read_bytes())
    content[content.rindex(b"flipped.pt", 0, -200) + 60] ^= 255
    (tmp_path / "outer.zip").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"outer.zip is damaged"):
        LazyArchive.open(tmp_path / "outer.zip", "flipped.pt")


def test_a_closed_archive_reads_no_more(tmp_path: Path) -> None:
    with LazyArchive(save([torch.ones(3)], tmp_path / "x.pt", zipped=True)) as archive:
        pass
    with pytest.raises(ValueError, match="closed"):
        archive.tree[0].read()
