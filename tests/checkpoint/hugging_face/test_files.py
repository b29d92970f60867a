"""The tensors of a model directory are found in whichever files `transformers` has put them."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.hugging_face.files import HuggingFaceFiles
from megatron.checkpoint.tensor_source import TensorSource
from megatron.errors import CheckpointError, ConfigError

safetensors = pytest.importorskip("safetensors.torch")

KINDS = ("safetensors", "safetensors in parts", "bin", "bin in parts", "legacy bin")
INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = random.Random(seed)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    dtypes += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    shapes = [[rng.randrange(5) for _ in range(rng.randrange(4))] for _ in range(20)]
    return {
        f"encoder.layer.{i}.{rng.choice(['weight', 'bias'])}": (100 * torch.rand(shape)).to(
            rng.choice(dtypes)
        )
        for i, shape in enumerate(shapes)
    }


def save(directory: Path, kind: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write what `save_pretrained` writes."""
    ending = "safetensors" if kind.startswith("safetensors") else "bin"
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = list(tensors)
    shards = {f"{stem}.{ending}": names}
    if kind.endswith("parts"):
        shards = {f"{stem}-{i + 1:05d}-of-00003.{ending}": names[i::3] for i in range(3)}
        weight_map = {name: file for file, shard in shards.items() for name in shard}
        document = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / INDEX[ending]).write_text(json.dumps(document))
    for file, shard in shards.items():
        part = {name: tensors[name] for name in shard}
        if ending == "safetensors":
            safetensors.save_file(part, directory / file, metadata={"format": "pt"})
        else:
            zipped = not kind.startswith("legacy")
            torch.save(part, directory / file, _use_new_zipfile_serialization=zipped)


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    with HuggingFaceFiles(directory) as files:
        return {name: files.read(name) for name in files.shapes}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_every_kind_of_files_is_read(tmp_path: Path, kind: str, seed: int) -> None:
    expected = tensors(seed)
    save(tmp_path, kind, expected)
    with HuggingFaceFiles(tmp_path) as files:
        source: TensorSource = files
        assert source.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
        assert source.dtypes == {name: tensor.dtype for name, tensor in expected.items()}
        for name, tensor in expected.items():
            assert torch.equal(source.read(name), tensor)
        with pytest.raises(KeyError):
            source.read("absent")


def test_safetensors_come_first(tmp_path: Path) -> None:
    order = ("bin in parts", "bin", "safetensors in parts", "safetensors")
    for value, kind in enumerate(order):
        save(tmp_path, kind, {f"w{i}": torch.tensor(value) for i in range(3)})
        assert read_all(tmp_path) == {f"w{i}": torch.tensor(value) for i in range(3)}


@pytest.mark.parametrize("kind", KINDS)
def test_old_names_of_a_norm_become_present_ones(tmp_path: Path, kind: str) -> None:
    old = ["a.LayerNorm.gamma", "a.LayerNorm.beta", "gamma", "b.gamma.c", "b.my_gamma", "alphabeta"]
    new = ["a.LayerNorm.weight", "a.LayerNorm.bias", "weight", "b.gamma.c", "b.my_gamma"]
    save(tmp_path, kind, {name: torch.tensor(i) for i, name in enumerate(old)})
    found = read_all(tmp_path)
    assert found == {name: torch.tensor(i) for i, name in enumerate([*new, "alphabeta"])}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_under_both_names_is_refused(tmp_path: Path, kind: str) -> None:
    save(tmp_path, kind, {"norm.weight": torch.ones(1), "norm.gamma": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"holds norm.weight twice, once as norm.(gamma|we)"):
        HuggingFaceFiles(tmp_path)


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{tmp_path} holds no weights; expected one of"):
        HuggingFaceFiles(tmp_path)
    with pytest.raises(CheckpointError, match=r"absent holds no weights"):
        HuggingFaceFiles(tmp_path / "absent")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_index_that_does_not_fit_is_named(tmp_path: Path, ending: str) -> None:
    save(tmp_path, f"{ending} in parts", tensors())
    index = tmp_path / INDEX[ending]
    document: dict[str, Any] = json.loads(index.read_text())
    lost = document["weight_map"]["encoder.layer.1.weight"] = sorted(tmp_path.glob("*1-of*"))[
        0
    ].name
    with pytest.raises(
        CheckpointError, match=rf"{lost} lacks encoder.layer.1.weight, which .*json"
    ):
        _opened_with(index, document)
    for files, problem in [
        ({"a": "../b.bin"}, "files outside its directory"),
        ({"a": "b.bin"}, "names b.bin, which is missing"),
        ({"a": ".."}, "names .., which is missing"),
        ({"a": 3}, "is damaged"),
        (["a"], "is damaged"),
        (None, "is damaged"),
    ]:
        with pytest.raises(CheckpointError, match=f"{index.name} .*{problem}"):
            _opened_with(index, {"weight_map": files})
    with pytest.raises(CheckpointError, match=f"{index.name} is damaged"):
        _opened_with(index, {})
    index.write_text('{"weight_map": {"a"')
    with pytest.raises(CheckpointError, match=f"{index.name} is damaged"):
        HuggingFaceFiles(tmp_path)


def _opened_with(index: Path, document: Any) -> None:
    index.write_text(json.dumps(document))
    HuggingFaceFiles(index.parent)


def test_tensors_that_the_index_leaves_out_are_left(tmp_path: Path) -> None:
    save(tmp_path, "safetensors in parts", {f"w{i}": torch.tensor(i) for i in range(6)})
    index = tmp_path / INDEX["safetensors"]
    document = json.loads(index.read_text())
    del document["weight_map"]["w3"]
    index.write_text(json.dumps(document))
    assert sorted(read_all(tmp_path)) == ["w0", "w1", "w2", "w4", "w5"]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_names_the_file(tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    save(tmp_path, kind, tensors())
    file = next(path for path in sorted(tmp_path.iterdir()) if path.suffix != ".json")
    whole = file.read_bytes()
    caught = 0
    for i in range(60):
        damaged = bytearray(whole)
        if i % 3:
            damaged[rng.randrange(min(len(damaged), 2000))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(damaged)) :]
        file.write_bytes(damaged)
        problem = problem_with(tmp_path)
        assert problem is None or str(tmp_path) in problem
        caught += problem is not None
    assert caught > 20
    file.unlink()
    assert file.name in str(problem_with(tmp_path)) or "holds no weights" in str(
        problem_with(tmp_path)
    )


def problem_with(directory: Path) -> str | None:
    try:
        read_all(directory)
    except CheckpointError as error:
        (problem,) = error.problems
        return problem
    return None


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([torch.ones(1)], "a list"),
        ({"epoch": 3}, "epoch, a int"),
        ({"model": {"w": torch.ones(1)}}, "model, a dict"),
        ({1: torch.ones(1)}, "1, a LazyTensor"),
    ],
)
def test_anything_but_named_tensors_is_refused(tmp_path: Path, content: Any, named: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin holds {named}, expected"):
        HuggingFaceFiles(tmp_path)


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    safetensors.save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content.replace(b'"F32"', b'"U32"'))
    with pytest.raises(CheckpointError, match="model.safetensors: w is of type 'U32'"):
        HuggingFaceFiles(tmp_path)


def test_without_the_package_bin_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "bin", {"w": torch.ones(1)})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert read_all(tmp_path) == {"w": torch.ones(1)}
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"model.safetensors needs the package safetensors"):
        HuggingFaceFiles(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_what_was_read_is_no_part_of_the_file(tmp_path: Path, kind: str) -> None:
    expected = tensors()
    save(tmp_path, kind, expected)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    found = read_all(tmp_path)
    for tensor in read_all(tmp_path).values():
        tensor.zero_()
    assert file.read_bytes() == before
    file.unlink()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists mappings")
def test_nothing_of_a_file_stays_mapped(tmp_path: Path) -> None:
    """Mapped pages count as memory of the process: a model's would add up."""
    save(tmp_path, "safetensors in parts", {f"w{i}": torch.full((9999,), i) for i in range(6)})
    with HuggingFaceFiles(tmp_path) as files:
        for i in range(6):
            assert (files.read(f"w{i}") == i).all()
            assert str(tmp_path) not in Path("/proc/self/maps").read_text()
