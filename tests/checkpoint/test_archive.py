"""`torch.save` files are read as `torch.load` reads them, lazily, and nothing in them is run."""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import io
import operator
import os
import pickle
import random
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.checkpoint.archive import LazyArchive, LazyTensor, Unknown
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


@FORMATS
def test_members_of_megatron_are_named_and_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    modules = ("megatron.model.enums", "fp16.loss_scaler", "fp16")
    for name in modules:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = enum.Enum("AttnMaskType", {"padding": 1}, module=modules[0])
    scaler = type("DynamicLossScaler", (), {"__module__": modules[1]})
    sys.modules[modules[0]].AttnMaskType = kind  # type: ignore[attr-defined]
    sys.modules[modules[1]].DynamicLossScaler = scaler  # type: ignore[attr-defined]
    loss_scaler = scaler()
    loss_scaler.cur_scale = 2.0
    args = argparse.Namespace(mask=kind(1), masks=[kind(1)])
    path = save({"args": args, "scaler": loss_scaler}, tmp_path / "args.pt", zipped)
    for name in modules:
        monkeypatch.delitem(sys.modules, name)
    found = load(path)
    padding = Unknown("megatron.model.enums", "AttnMaskType", (1,))
    assert found["args"] == argparse.Namespace(mask=padding, masks=[padding])
    assert found["scaler"] == Unknown("fp16.loss_scaler", "DynamicLossScaler", ())
    assert not set(modules) & set(sys.modules)


# What a checkpoint must not hold.


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


def shell(marker: Path) -> str:
    return f"touch {marker}"


EVIL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "system": (lambda m: Call(os.system, shell(m)), "posix.system"),
    "popen": (lambda m: Call(subprocess.Popen, ["touch", str(m)]), "subprocess.Popen"),
    "eval": (lambda m: Call(eval, f"open({str(m)!r}, 'w')"), "builtins.eval"),
    "exec": (lambda m: Call(exec, f"open({str(m)!r}, 'w')"), "builtins.exec"),
    "open": (lambda m: Call(open, str(m), "w"), "io.open"),
    "getattr": (
        lambda m: Call(getattr, Call(getattr, argparse.Namespace, "__init__"), "__globals__"),
        "builtins.getattr",
    ),
    "attrgetter": (lambda m: Call(operator.attrgetter("system"), 1), "operator.attrgetter"),
    "partial": (lambda m: functools.partial(os.system, shell(m)), "functools.partial"),
    "import": (lambda m: Call(__import__, "antigravity"), "builtins.__import__"),
    "class": (lambda m: Trees(1), "tests.checkpoint.test_archive.Trees"),
    "class as value": (lambda m: argparse.Namespace, "argparse.Namespace"),
    "function as value": (lambda m: torch._utils._rebuild_tensor_v2, "_rebuild_tensor_v2"),
    "torch.load": (lambda m: Call(torch.load, str(m)), "torch.serialization.load"),
    "hub": (lambda m: Call(torch.hub.load, "a/b", "c"), "torch.hub.load"),
    "module": (lambda m: torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    "storage": (lambda m: torch.FloatStorage([1.0]), "a storage"),
    "sparse": (lambda m: torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    "generator": (lambda m: np.random.default_rng(0), "numpy.random._pickle"),
    "objects": (lambda m: np.array([Call(os.system, shell(m))], dtype=object), "posix.system"),
    "plain objects": (lambda m: np.array([None], dtype=object), "numpy.dtype"),
    "record array": (lambda m: np.zeros(1, dtype=[("a", "i4")]), "numpy.dtype"),
    "factory": (
        lambda m: collections.defaultdict(functools.partial(os.system, shell(m))),
        "functools.partial",
    ),
    "allowed as factory": (lambda m: collections.defaultdict(complex), "defaultdict"),
    "codec": (lambda m: Call(__import__("_codecs").encode, "a", "rot13"), "_codecs.encode"),
    "plain type called": (lambda m: Call(list, ()), "builtins.list"),
    "rebuilt by a call": (
        lambda m: Call(torch._tensor._rebuild_from_type_v2, os.system, int, (shell(m),), {}),
        "posix.system",
    ),
    "rebuilt by an allowed call": (
        lambda m: Call(torch._tensor._rebuild_from_type_v2, torch.device, torch.Tensor, ("a",), {}),
        "torch.device",
    ),
    "state of a call": (
        lambda m: Call(torch.device, "cpu", state={"x": Call(os.system, shell(m))}),
        "posix.system",
    ),
    "attribute of a dictionary": (
        lambda m: Call(collections.OrderedDict, state={"items": Call(os.system, shell(m))}),
        "posix.system",
    ),
    "key": (lambda m: {Call(os.system, shell(m)): 1}, "posix.system"),
    "conjugated": (lambda m: torch.ones(1, dtype=torch.complex64).conj(), "_rebuild_tensor_v2"),
    "in a namespace": (
        lambda m: argparse.Namespace(a=collections.Counter()),
        "collections.Counter",
    ),
}


@FORMATS
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", EVIL)
def test_what_is_no_plain_value_is_refused_by_name(tmp_path: Path, name: str, zipped: bool) -> None:
    marker = tmp_path / "it_ran"
    make, named = EVIL[name]
    path = save({"model": {"x": make(marker)}}, tmp_path / "evil.pt", zipped)
    with pytest.raises(CheckpointError) as caught:
        LazyArchive(path)
    assert named in str(caught.value)
    assert str(path) in str(caught.value)
    assert not marker.exists()


def test_the_payloads_would_run(tmp_path: Path) -> None:
    """The test above can fail: `torch.load` runs what it refuses."""
    for zipped in (True, False):
        marker = tmp_path / f"{zipped}"
        path = save(EVIL["system"][0](marker), tmp_path / "evil.pt", zipped)
        torch.load(path, weights_only=False)
        assert marker.exists()


def test_a_view_that_conjugates_is_refused_for_that(tmp_path: Path) -> None:
    path = save(torch.ones(1, dtype=torch.complex64).conj(), tmp_path / "c.pt", zipped=True)
    with pytest.raises(CheckpointError, match="conjugates"):
        LazyArchive(path)


NAMESPACE = b"cargparse\nNamespace\n"
HAND_WRITTEN = {
    "a class changed by slots": NAMESPACE + b"N}U\x08__init__Ns\x86b.",
    "a class changed by a dictionary": NAMESPACE + b"}X\x08\x00\x00\x00__init__Nsb.",
    "a call of an old instruction": b"(X\x04\x00\x00\x00trueios\nsystem\n.",
    "another call of an old instruction": b"(cos\nsystem\nX\x04\x00\x00\x00trueo.",
    "a dotted name": b"\x80\x04\x8c\x08argparse\x8c\x0c_os.system.x\x93.",
    "an unknown extension": b"\x80\x02\x82\x01.",
    "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
    "a namespace of numbers": NAMESPACE + b")\x81}K\x01K\x02sb.",
    "a namespace with arguments": NAMESPACE + b"K\x01\x85\x81}b.",
    "a tuple changed": b"\x80\x02K\x01\x85}X\x01\x00\x00\x00aK\x01sb.",
    "a type changed": b"ctorch\nfloat16\n}X\x01\x00\x00\x00aK\x01sb.",
    "an instruction that asks for 64 GB": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a text of 2 GB": b"\x80\x02T\xff\xff\xff\x7fabc.",
    "an endless nest": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "nothing": b"",
    "no end": b"\x80\x02]",
    "an unhashable key": b"\x80\x02}]K\x01s.",
    "a storage of no type": b"\x80\x02(X\x07\x00\x00\x00storageK\x01K\x02K\x03K\x04tQ.",
    "a foreign object": b"\x80\x02X\x06\x00\x00\x00modulecos\nsystem\n\x86Q.",
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_a_hand_written_pickle_is_refused(tmp_path: Path, name: str) -> None:
    before = dict(vars(argparse.Namespace))
    path = save({}, tmp_path / "plain.pt", zipped=True)
    changed = rewritten(path, lambda n, data: HAND_WRITTEN[name] if n == "data.pkl" else data)
    with pytest.raises(CheckpointError, match=changed.name):
        LazyArchive(changed)
    assert dict(vars(argparse.Namespace)) == before


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (-1, (1,), (1,)),
        (0, (2, 3), (4, 1)),
        (0, (2,), (-1,)),
        (0, (-1,), (1,)),
        (0, (2, 2), (1,)),
        (0, (2.0,), (1,)),
        (0, (True,), (1,)),
        ("0", (1,), (1,)),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(
    tmp_path: Path, offset: Any, shape: Any, stride: Any
) -> None:
    record = Persistent(("storage", torch.FloatStorage, "0", "cpu", 6))
    call = Call(torch._utils._rebuild_tensor_v2, record, offset, shape, stride, False, {})
    path = save({"a": torch.ones(6)}, tmp_path / "plain.pt", zipped=True)
    pickled = dumps_persistent({"weight": call})
    changed = rewritten(path, lambda name, data: pickled if name == "data.pkl" else data)
    with pytest.raises(CheckpointError, match=r"weight .*_rebuild_tensor_v2"):
        LazyArchive(changed)


# Damage.


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
        assert problem is None or "\n" not in problem
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
