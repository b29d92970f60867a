"""Write a file that `torch.load` reads, holding one of its tensors in memory at a time.

`torch.save` wants all tensors at once. But in the zip format the pickled objects need only the
shape and type of a tensor and the key of its storage, and the storages follow one by one. So the
objects are pickled first, with `DeferredTensor`s in them, and each tensor is made when its turn
comes.
`archive` describes the format.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.archive.record import STORAGE_TYPES

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_TYPES.items()}
_PROTOCOL = 2  # what torch.save uses; every version of PyTorch reads it


@dataclass(frozen=True)
class DeferredTensor:
    """A tensor to come: `make` returns it, of this shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> DeferredTensor:
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_archive(
    path: Path, tree: Any, *, on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    """Write `tree` to `path`, which appears, or changes, once all of it is on the disk.

    tree: dictionaries, lists, tuples, plain values, numpy arrays, `argparse.Namespace`s, tensors
        and `DeferredTensor`s; those are made one at a time, in the order in which they are met.
    on_bytes: told how many bytes of tensors have been written so far.
    """
    beside = path.with_name(f"{path.name}.incomplete")
    try:
        with beside.open("wb") as file:
            _write(file, tree, on_bytes)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # the disk is full
            error.filename = str(path)
        raise


def _write(file: io.BufferedWriter, tree: Any, on_bytes: Callable[[int], None]) -> None:
    objects = io.BytesIO()
    pickler = _Pickler(objects)
    pickler.dump(tree)
    archive: Any = torch._C.PyTorchFileWriter(file)
    try:
        archive.write_record("data.pkl", objects.getvalue(), len(objects.getvalue()))
        archive.write_record("byteorder", sys.byteorder.encode(), len(sys.byteorder))
        written = 0
        for key, deferred in enumerate(pickler.deferred):
            archive.write_record(f"data/{key}", _made(deferred), deferred.num_bytes)
            written += deferred.num_bytes
            on_bytes(written)
    except BaseException:
        # Else its destructor would do it, and end the process where that fails.
        with suppress(RuntimeError, OSError):
            archive.write_end_of_file()
        raise
    archive.write_end_of_file()


def _made(deferred: DeferredTensor) -> torch.UntypedStorage:
    """The bytes of a deferred tensor, and nothing else that its storage may hold."""
    tensor = deferred.make().detach().cpu().contiguous()
    assert (tensor.shape, tensor.dtype) == (deferred.shape, deferred.dtype), f"{deferred}"
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return torch.from_numpy(flat.view(torch.uint8).numpy()).untyped_storage()


@dataclass(frozen=True)
class _Storage:
    """The storage of the deferred tensor number `key`."""

    key: int
    dtype: torch.dtype
    size: int


class _Pickler(pickle.Pickler):
    """Pickles a tensor as `torch.save` does, except that its storage is yet to come."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        self.deferred: list[DeferredTensor] = []

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            obj = DeferredTensor.of(obj)
        if not isinstance(obj, DeferredTensor):
            return NotImplemented
        storage = _Storage(len(self.deferred), obj.dtype, math.prod(obj.shape))
        self.deferred.append(obj)
        stride = _contiguous(obj.shape)
        arguments: tuple[Any, ...] = (storage, 0, tuple(obj.shape), stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        storage_type = getattr(torch, _STORAGE_NAMES[obj.dtype])
        return "storage", storage_type, str(obj.key), "cpu", obj.size


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(max(n, 1) for n in shape[dim + 1 :]) for dim in range(len(shape)))
