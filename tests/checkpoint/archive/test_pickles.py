"""What is no tensor and no plain value is refused by name, and is not run."""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import operator
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.checkpoint.archive import LazyArchive, Unknown
from megatron.errors import CheckpointError
from tests.checkpoint.archive.support import (
    FORMATS,
    Call,
    Persistent,
    Trees,
    dumps_persistent,
    load,
    rewritten,
    save,
)


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
    "class": (lambda m: Trees(1), "tests.checkpoint.archive.support.Trees"),
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
