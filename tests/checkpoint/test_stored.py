"""Any split of any tensor is stored as the global tensor, and damage to it is named."""

from __future__ import annotations

import os
import pickle
import random
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from megatron.checkpoint.sharded import GlobalTensor
from megatron.checkpoint.stored import StoredTensors
from megatron.errors import CheckpointError
from megatron.mpu.shard_spec import ShardSpec
from tests.checkpoint.support import local_part, random_spec, values

SIZES = (1, 2, 3, 4, 6)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(path: Path, tensors: dict[str, GlobalTensor]) -> None:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

    class Writer(dcp.FileSystemWriter):
        def storage_meta(self) -> None:
            return None

    dcp.save(tensors, storage_writer=Writer(path), planner=planner, no_dist=True)


def from_all_ranks(whole: torch.Tensor, spec: ShardSpec, size: int) -> GlobalTensor:
    """The pieces that all `size` ranks of a tensor group offer, as if one process held them."""
    ranks = (
        GlobalTensor.of(local_part(whole, spec, rank, size), spec, rank, size)
        for rank in range(size if spec.dim is not None else 1)
    )
    pieces = chain.from_iterable(tensor.pieces for tensor in ranks)
    return GlobalTensor(spec.shape, pieces, dtype=whole.dtype, device=whole.device)


@pytest.mark.parametrize("seed", range(8))
def test_any_split_is_stored_as_the_global_tensor(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    specs = [random_spec(f"tensor{i}", rng, multiple=12) for i in range(12)]
    size = rng.choice(SIZES)
    save(tmp_path, {spec.name: from_all_ranks(values(spec), spec, size) for spec in specs})
    stored = StoredTensors(tmp_path)

    for spec in specs:
        assert stored.shapes[spec.name] == spec.shape
        assert torch.equal(stored.read(spec.name), values(spec))
    for new_size in SIZES:
        for rank in range(new_size):
            locals_ = {s.name: torch.zeros(s.local_shape(new_size)) for s in specs}
            stored.load(
                {s.name: GlobalTensor.of(locals_[s.name], s, rank, new_size) for s in specs}
            )
            for spec in specs:
                expected = local_part(values(spec), spec, rank, new_size).nan_to_num(nan=0.0)
                assert torch.equal(locals_[spec.name], expected), (spec, rank, new_size)


def test_values_are_converted_to_the_wanted_type(tmp_path: Path) -> None:
    whole = torch.randn(5, 3)
    save(tmp_path, {"weight": GlobalTensor.whole(whole)})
    half = torch.empty(5, 3, dtype=torch.bfloat16)
    StoredTensors(tmp_path).load({"weight": GlobalTensor.whole(half)})
    assert torch.equal(half, whole.to(torch.bfloat16))


@pytest.fixture
def stored_path(tmp_path: Path) -> Path:
    """A directory with two tensors in one file, `big` after `small`."""
    save(tmp_path, {"big": GlobalTensor.whole(torch.randn(50, 40))})
    data = (tmp_path / "__0_0.distcp").read_bytes()
    assert len(data) > 8000
    return tmp_path


def test_a_flipped_bit_is_found_and_named(stored_path: Path) -> None:
    path = stored_path / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: big at \(0, 0\) is damaged: bad ch"):
        StoredTensors(stored_path).read("big")


def test_any_damage_is_a_checkpoint_error(stored_path: Path) -> None:
    """Bytes overwritten anywhere in the data or its description are found or do no harm."""
    rng = random.Random(0)
    truth = StoredTensors(stored_path).read("big")
    for name in ("__0_0.distcp", ".metadata"):
        path = stored_path / name
        data = path.read_bytes()
        for _ in range(100):
            broken = bytearray(data)
            start = rng.randrange(len(data))
            broken[start : start + 8] = rng.randbytes(8)
            path.write_bytes(broken[: len(data)])
            try:
                stored = StoredTensors(stored_path)
                assert torch.equal(stored.read("big"), truth)
            except (CheckpointError, KeyError):
                pass
        path.write_bytes(data)


def test_missing_and_truncated_files_are_named(stored_path: Path) -> None:
    path = stored_path / "__0_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(
        CheckpointError, match=f"truncated: {len(data) - 1} bytes, .* big is cut off"
    ):
        StoredTensors(stored_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing; it holds big"):
        StoredTensors(stored_path)
    (stored_path / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata is missing"):
        StoredTensors(stored_path)


class Attack:
    """Runs a command when unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.witness}",)


def test_a_description_that_runs_code_is_refused(stored_path: Path) -> None:
    witness = stored_path / "witness"
    metadata = Metadata(state_dict_metadata={}, planner_data=Attack(witness), storage_data={})
    (stored_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"refused: it asks for (posix|nt|os)\.system"):
        StoredTensors(stored_path)
    assert not witness.exists()


def test_data_that_runs_code_is_refused(stored_path: Path) -> None:
    witness = stored_path / "witness"
    path = stored_path / "__0_0.distcp"
    size = path.stat().st_size
    with path.open("wb") as file:
        torch.save([Attack(witness), "x" * size], file)
    with pytest.raises(CheckpointError, match="big at"):
        StoredTensors(stored_path).read("big")
    assert not witness.exists()


def test_files_outside_the_directory_are_refused(stored_path: Path) -> None:
    path = stored_path / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../__0_0.distcp"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="refused"):
        StoredTensors(stored_path)


def test_boxes_that_leave_a_gap_are_reported(tmp_path: Path) -> None:
    spec = ShardSpec("weight", (8, 2), dim=0)
    part = local_part(torch.randn(8, 2), spec, 0, 2)
    save(tmp_path, {"weight": GlobalTensor.of(part, spec, 0, 2)})
    with pytest.raises(CheckpointError, match="holds 8 of 16 values of weight"):
        StoredTensors(tmp_path)
