"""Files that `torch.save` wrote, read without trusting them and without loading their tensors.

There are two formats. Since PyTorch 1.6 a file is a zip archive:

    <name>/data.pkl      the pickled objects, in which a tensor names its storage by a key
    <name>/data/<key>    the bytes of a storage
    <name>/byteorder     "little", where it is written at all

Before, it was a sequence: pickles of a magic number, a version, some facts about the machine, the
objects, and the list of keys; then, for each key, the number of elements as an int64 and the
bytes.

Either way the pickle is small and is read as `pickles` does, by an allow-list. Tensors
become `LazyTensor`s, which know where their bytes lie. A file may itself be a member of a zip
archive, as the released 345M models of Megatron-LM are.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

from megatron.checkpoint.archive.pickles import TensorFound, Unknown, read_pickle
from megatron.checkpoint.archive.record import RefusedError, StorageView
from megatron.errors import CheckpointError

__all__ = ["LazyArchive", "LazyTensor", "Unknown"]

_ZIP_START = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # start, ..., lengths of the name and the extra field
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_COUNT = struct.Struct("<q")
_COPIED_AT_ONCE = 2**24
_LONGEST_LINE = 500


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a storage lie in the file; their checksum where there is one."""

    begin: int
    size: int
    checksum: int | None


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor that stays in its file until `read`."""

    name: str  # the keys that lead to it, joined by dots
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    offset: int  # in its storage, in elements like the strides
    _storage: StorageView = field(repr=False)
    _archive: LazyArchive = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor, contiguous, in this process' memory.

        Raises:
            CheckpointError: its bytes are damaged or gone.
        """
        return self._archive._read(self)

    def _span(self) -> int:
        """Elements from its first to its last in the storage."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


class LazyArchive:
    """The content of a `torch.save` file; to be closed, or used in a `with` statement.

    `tree` holds dictionaries, lists, tuples, sets, plain values, `argparse.Namespace`s, numpy
    arrays, torch's types and devices, `LazyTensor`s, and `Unknown`s where the file names
    enumerations of Megatron-LM.

    Raises:
        CheckpointError: the file is missing, damaged or truncated, or holds anything else.
    """

    tree: Any

    def __init__(self, path: Path) -> None:
        self._set_up(str(path), _opened(path))

    @classmethod
    def open(cls, path: Path, member: str | None = None) -> Self:
        """The archive at `path`, or the one that is the member of a zip archive there.

        A member that is compressed is unpacked to a temporary file, which `close` deletes.
        """
        if member is None:
            return cls(path)
        archive = cls.__new__(cls)
        archive._set_up(f"{path} ({member})", _opened_member(path, member))
        return archive

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; its tensors cannot be read any more."""
        self._file.close()

    def _set_up(self, name: str, file: io.RawIOBase) -> None:
        self._name, self._file = name, file
        tensors: list[LazyTensor] = []

        def make(found: TensorFound) -> LazyTensor:
            storage = found.storage
            tensors.append(
                LazyTensor(
                    found.name,
                    found.shape,
                    storage.dtype,
                    found.stride,
                    found.start,
                    storage,
                    self,
                )
            )
            return tensors[-1]

        try:
            with _problems_named(name):
                self.tree, self._places = _load(file, make)
            for tensor in tensors:
                self._check(tensor)
        except BaseException:
            self.close()
            raise

    def _check(self, tensor: LazyTensor) -> None:
        """Hold the storage that a tensor is in against what there is in the file."""
        storage = tensor._storage
        expected = storage.total * storage.dtype.itemsize
        place = self._places.get(storage.key)
        if place is None:
            raise self._damage(tensor, f"storage {storage.key} is missing")
        if place.size != expected:
            raise self._damage(
                tensor, f"storage {storage.key} has {place.size} bytes, expected {expected}"
            )
        if place.begin + place.size > (end := self._file.seek(0, io.SEEK_END)):
            raise self._damage(
                tensor, f"the file ends after {end} bytes, expected {place.begin + place.size}"
            )

    def _read(self, tensor: LazyTensor) -> torch.Tensor:
        place = self._places[tensor._storage.key]
        try:
            span = torch.empty(tensor._span(), dtype=tensor.dtype)
            data = span.view(torch.uint8).numpy().data
            _fill(data, self._file, place.begin + tensor.offset * tensor.dtype.itemsize)
            whole = len(data) == place.size
            if whole and place.checksum is not None and zlib.crc32(data) != place.checksum:
                raise self._damage(tensor, f"bad checksum of storage {tensor._storage.key}")
            strided = span.as_strided(tensor.shape, tensor.stride)
            return span.view(tensor.shape) if strided.is_contiguous() else strided.contiguous()
        except (OSError, EOFError, MemoryError, RuntimeError) as error:
            raise self._damage(tensor, f"{error}") from error

    def _damage(self, tensor: LazyTensor, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._name}: {_line(tensor.name)} is damaged: {_line(problem)}")


_Loaded = tuple[Any, dict[str, _Place]]


def _load(file: io.RawIOBase, make: Callable[[TensorFound], LazyTensor]) -> _Loaded:
    """The tree of a file, and where its storages lie."""
    file.seek(0)
    start = file.read(len(_ZIP_START))
    file.seek(0)
    if start == _ZIP_START:
        return _load_zip(file, make)
    if not start.startswith(pickle.PROTO):
        raise RefusedError("torch.save did not write it")
    buffered: Any = io.BufferedReader(file)
    try:
        return _load_legacy(buffered, make)
    finally:
        buffered.detach()


def _load_zip(file: io.RawIOBase, make: Callable[[TensorFound], LazyTensor]) -> _Loaded:
    if not zipfile.is_zipfile(file):
        size = file.seek(0, io.SEEK_END)
        raise EOFError(
            f"truncated after {size} bytes; the list of its records, its end, is missing"
        )
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        folders = [name.partition("/")[0] for name in records if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise RefusedError(f"torch.save did not write it; it holds {_some(records)}")
        folder = folders[0]
        order = f"{folder}/byteorder"
        if order in records and archive.read(_uncompressed(records[order])) != b"little":
            raise RefusedError("its bytes are in big-endian order")
        pickled = archive.read(_uncompressed(records[f"{folder}/data.pkl"]))
        tree, storages = read_pickle(io.BytesIO(pickled), make)
        names = {key: f"{folder}/data/{key}" for key in storages}
        places = {
            key: _place(file, _uncompressed(records[name]))
            for key, name in names.items()
            if name in records
        }
    return tree, places


def _load_legacy(file: BinaryIO, make: Callable[[TensorFound], LazyTensor]) -> _Loaded:
    magic, version, machine = (read_pickle(file, make)[0] for _ in range(3))
    if (magic, version) != (_LEGACY_MAGIC, _LEGACY_VERSION):
        raise RefusedError("torch.save did not write it")
    if not machine["little_endian"]:
        raise RefusedError("its bytes are in big-endian order")
    tree, storages = read_pickle(file, make)
    places: dict[str, _Place] = {}
    keys, _ = read_pickle(file, make)
    begin = file.tell()
    for key in keys:
        file.seek(begin)
        head = file.read(_COUNT.size)
        if len(head) == _COUNT.size:
            (count,) = _COUNT.unpack(head)
        else:  # the file is cut off; where this storage should be, tells what is lost
            count = storages[key].total
        size = count * storages[key].dtype.itemsize
        places[key] = _Place(begin + _COUNT.size, size, None)
        begin += _COUNT.size + size
    return tree, places


def _place(file: io.RawIOBase, record: zipfile.ZipInfo) -> _Place:
    """Where the data of an uncompressed record lies: behind a header of its own."""
    header = bytearray(_LOCAL_HEADER.size)
    _fill(memoryview(header), file, record.header_offset)
    start, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if start != _ZIP_START:
        raise zipfile.BadZipFile(f"no header of {record.filename}")
    begin = record.header_offset + len(header) + name_length + extra_length
    return _Place(begin, record.file_size, record.CRC)


def _uncompressed(record: zipfile.ZipInfo) -> zipfile.ZipInfo:
    if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
        raise RefusedError(f"{record.filename} is compressed, which torch.save never does")
    return record


class _Window(io.RawIOBase):
    """A part of a file as a file of its own; closing it closes the file."""

    def __init__(self, file: io.RawIOBase, place: _Place) -> None:
        self._file, self._place, self._position = file, place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._place.size}[whence]
        if base + offset < 0:
            raise OSError(f"position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int | None:
        view = memoryview(buffer).cast("B")
        left = max(self._place.size - self._position, 0)
        self._file.seek(self._place.begin + self._position)
        count = self._file.readinto(view[:left])
        self._position += count or 0
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _opened(path: Path) -> io.RawIOBase:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error


def _opened_member(path: Path, member: str) -> io.RawIOBase:
    """A file that the zip archive at `path` holds, unpacked where it is compressed."""
    file = _opened(path)
    try:
        with _problems_named(str(path)), zipfile.ZipFile(file) as archive:
            if member not in archive.namelist():
                raise RefusedError(f"there is no {member} in it, only {_some(archive.namelist())}")
            record = archive.getinfo(member)
            if record.compress_type == zipfile.ZIP_STORED:
                return _Window(file, _place(file, record))
            unpacked = _unpacked(archive, record)
    except BaseException:
        file.close()
        raise
    file.close()
    return unpacked


def _unpacked(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> io.RawIOBase:
    file = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with archive.open(record) as packed:
            shutil.copyfileobj(packed, file, _COPIED_AT_ONCE)
    except BaseException:
        file.close()
        raise
    return file.detach()


@contextmanager
def _problems_named(name: str) -> Iterator[None]:
    """Whatever a damaged file leads to is a CheckpointError that names the file."""
    try:
        yield
    except RefusedError as error:
        raise CheckpointError(f"{name} is refused: {_line(error)}") from error
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {_line(error)}") from error
    except Exception as error:  # a damaged file can fail in any way that its parts can
        problem = _line(error) or type(error).__name__
        raise CheckpointError(f"{name} is damaged: {problem}") from error


def _fill(buffer: memoryview, file: io.RawIOBase, begin: int) -> None:
    file.seek(begin)
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise EOFError(f"the file ends {len(buffer) - done} bytes too early")
        done += count


def _some(names: Iterable[str]) -> str:
    first = list(itertools.islice(names, 6))
    return ", ".join(first[:5]) + (", ..." if len(first) > 5 else "") or "nothing"


def _line(text: object) -> str:
    """The first line of a text, which may come from the file, fit for a terminal."""
    first = f"{text}".partition("\n")[0][:_LONGEST_LINE]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in first)
