"""What a pickle asks for, noted and not done.

A pickle is a program: it names classes and functions and has them called. Here whatever it names
becomes a class of no ability, made for this name alone. Calling that notes the arguments, and what
is done to the result, such as setting items or a state, is noted as well. No foreign code runs, and
a name that is not allowed ends it. `pickles` makes values of the record.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import torch

STORAGE_TYPES = MappingProxyType(
    {
        "DoubleStorage": torch.float64,
        "FloatStorage": torch.float32,
        "HalfStorage": torch.float16,
        "BFloat16Storage": torch.bfloat16,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
        "ShortStorage": torch.int16,
        "CharStorage": torch.int8,
        "ByteStorage": torch.uint8,
        "BoolStorage": torch.bool,
        "ComplexDoubleStorage": torch.complex128,
        "ComplexFloatStorage": torch.complex64,
    }
)
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_NUMBERING = ("PUT", "BINPUT", "LONG_BINPUT")  # instructions that number an object

# Nothing plain is as long as this; a damaged length could ask for the memory of a whole file.
_LONGEST_READ = 2**28


class RefusedError(Exception):
    """What a pickle asks for and does not get."""


class StorageView(NamedTuple):
    """Elements `start` to `start + length` of the storage `key`, which has `total` of them."""

    key: str
    dtype: torch.dtype
    total: int
    start: int
    length: int


def record_pickle(
    stream: BinaryIO, allowed: Callable[[str], bool]
) -> tuple[Any, dict[str, StorageView]]:
    """The record of the pickle that begins at the stream's position, which then is behind it.

    In the record, `Call`s and `Name`s stand among plain values, `StorageView`s for storages. The
    second result holds each storage by its key.

    allowed: whether the pickle may use a name, such as "collections.OrderedDict".

    Raises:
        RefusedError: a name is not allowed.
        Exception: of any kind where the pickle is damaged.
    """
    recorder = _Recorder(io.BytesIO(_cut_out(stream)), allowed)
    return recorder.load(), recorder.storages


def name_of(record: Any) -> str:
    """The full name that a `Name` stands for; the type's name of anything else."""
    if isinstance(record, Name):
        return vars(record)["full_name"]
    return type(record).__name__


def are_counts(*values: Any) -> bool:
    """Whether all values are integers that can count something."""
    return all(type(value) is int and value >= 0 for value in values)


def _cut_out(stream: BinaryIO) -> bytes:
    """The bytes of one pickle, once its instructions are known to be of a sane size."""
    begin = stream.tell()
    careful: Any = _Careful(stream)
    for count, (code, argument, _) in enumerate(pickletools.genops(careful)):
        # The unpickler makes room for as many objects as the highest number promises.
        if isinstance(argument, int) and code.name in _NUMBERING and not 0 <= argument <= count:
            raise pickle.UnpicklingError(f"instruction {count} names object {argument}")
    end = stream.tell()
    stream.seek(begin)
    return stream.read(end - begin)


class _Careful:
    """A stream that refuses to read what only a damaged length can ask for."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST_READ:
            raise pickle.UnpicklingError(f"a value of {size} bytes")
        return self._stream.read(size)

    def readline(self) -> bytes:
        return self._stream.readline(_LONGEST_READ)


class Name(type):
    """The type of what a name in a pickle becomes."""


class Call(metaclass=Name):
    """The record of a call: each name in a pickle gets a subclass, each call is an instance."""

    __slots__ = ("arguments", "items", "state")
    full_name = ""

    arguments: tuple[Any, ...]
    items: list[tuple[Any, Any]]
    state: Any

    def __new__(cls, *arguments: Any) -> Call:
        call = super().__new__(cls)
        call.arguments, call.items, call.state = arguments, [], None
        return call

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    # BUILD calls this, and sets no attributes, neither of a call nor of the class.
    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Recorder(pickle.Unpickler):
    """Notes what a pickle asks for."""

    def __init__(self, file: BinaryIO, allowed: Callable[[str], bool]) -> None:
        super().__init__(file, encoding="utf-8")
        self._allowed = allowed
        self.storages: dict[str, StorageView] = {}

    def find_class(self, module: str, name: str) -> Any:
        # Protocol 2 has Python 2's names of the standard library.
        there = IMPORT_MAPPING.get(module, module), name
        module, name = NAME_MAPPING.get((module, name), there)
        module = re.sub(r"^numpy\._core\b", "numpy.core", module)  # its name since numpy 2
        full_name = f"{module}.{name}"
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        storage = module == "torch" and name in STORAGE_TYPES
        if not storage and not self._allowed(full_name):
            raise RefusedError(f"it holds {full_name}; only tensors and plain values are read")
        return Name(name, (Call,), {"__slots__": (), "full_name": full_name})

    def persistent_load(self, pid: Any) -> StorageView:
        kind, storage_type, key, _location, total, *views = pid
        if kind != "storage":
            raise RefusedError(f"it holds a {kind}; only tensors and plain values are read")
        dtype = STORAGE_TYPES[name_of(storage_type).removeprefix("torch.")]
        _, start, length = (views or [None])[0] or (None, 0, total)
        if (
            not isinstance(key, str)
            or not are_counts(total, start, length)
            or start + length > total
        ):
            raise ValueError(f"{length} elements at {start} of {total} in storage {key}")
        view = StorageView(key, dtype, total, start, length)
        known = self.storages.setdefault(key, view)
        if (known.dtype, known.total) != (dtype, total):
            raise ValueError(f"storage {key} of {known.total} {known.dtype} and of {total} {dtype}")
        return view
