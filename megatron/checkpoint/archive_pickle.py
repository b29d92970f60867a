"""The pickle inside a `torch.save` file, read without running anything that it names.

A pickle is a program: it names classes and functions and has them called. Here that happens in two
steps, neither of which runs foreign code.

1. `_Recorder` lets the pickle build a record only. Whatever it names becomes a class of no ability,
   made for this name (`_Named`); calling it notes the arguments, `BUILD` notes the state. A name
   that no checkpoint needs is refused at once.
2. `_Translator` turns the record into tensors and plain values. For every name in `_MAKERS` it
   knows what may have been noted, and rejects all else.

Enumerations of Megatron-LM, which saved arguments hold, and its loss scaler become `Unknown`: their
name and the arguments of the call, nothing of what they can do.
"""

from __future__ import annotations

import argparse
import io
import math
import pickle
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch

_T = TypeVar("_T")
Keys = tuple[str, ...]  # the keys that lead to a value

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
_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype)

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


@dataclass(frozen=True)
class Unknown:
    """Stands for an object of Megatron-LM, a member of an enumeration for instance."""

    module: str
    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class TensorFound:
    """Where a tensor of a pickle lies: `start` and `stride` count elements of its storage."""

    name: str
    storage: StorageView
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickle(
    stream: BinaryIO, make: Callable[[TensorFound], Any]
) -> tuple[Any, dict[str, StorageView]]:
    """The tensors and plain values of the pickle that begins at the stream's position.

    The stream then stands behind the pickle. `make` turns each tensor into what the result holds.
    The second result names the storages that the pickle refers to, some perhaps in vain.

    Raises:
        RefusedError: there is something else in it.
        Exception: of any kind where the pickle is damaged.
    """
    recorder = _Recorder(io.BytesIO(_cut_out(stream)), encoding="utf-8")
    return _Translator(make).value(recorder.load(), ()), recorder.storages


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


class _Careful(io.RawIOBase):
    """A stream that refuses to read what only a damaged length can ask for."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LONGEST_READ:
            raise pickle.UnpicklingError(f"a value of {size} bytes")
        return self._stream.read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._stream.readline(_LONGEST_READ)


class _Name(type):
    """The type of what a name in a pickle becomes."""


class _Named(metaclass=_Name):
    """The record of a call: each name in a pickle gets a subclass, each call is an instance."""

    __slots__ = ("arguments", "items", "state")
    full_name = ""

    arguments: tuple[Any, ...]
    items: list[tuple[Any, Any]]
    state: Any

    def __new__(cls, *arguments: Any) -> _Named:
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

    def __init__(self, file: BinaryIO, *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
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
        if not (storage or full_name in _MAKERS or full_name in _BARE or _of_megatron(module)):
            raise RefusedError(f"it holds {full_name}; only tensors and plain values are read")
        return _Name(name, (_Named,), {"__slots__": (), "full_name": full_name})

    def persistent_load(self, pid: Any) -> StorageView:
        kind, storage_type, key, _location, total, *views = pid
        if kind != "storage":
            raise RefusedError(f"it holds a {kind}; only tensors and plain values are read")
        dtype = STORAGE_TYPES[_name_of(storage_type).removeprefix("torch.")]
        _, start, length = (views or [None])[0] or (None, 0, total)
        if not isinstance(key, str) or not _counts(total, start, length) or start + length > total:
            raise ValueError(f"{length} elements at {start} of {total} in storage {key}")
        view = StorageView(key, dtype, total, start, length)
        known = self.storages.setdefault(key, view)
        if (known.dtype, known.total) != (dtype, total):
            raise ValueError(f"storage {key} of {known.total} {known.dtype} and of {total} {dtype}")
        return view


class _Translator:
    """Turns records into values; what a pickle holds twice comes out as one object, too."""

    def __init__(self, make_tensor: Callable[[TensorFound], Any]) -> None:
        self.make_tensor = make_tensor
        self._known: dict[int, Any] = {}
        self._inside: set[int] = set()

    def value(self, record: Any, keys: Keys) -> Any:
        """The value of a record found at `keys`."""
        if type(record) in _PLAIN:
            return record
        key = id(record)  # of an object that the whole record keeps alive
        if key in self._inside:
            raise RefusedError(f"{_at(keys)} holds itself")
        if key not in self._known:
            self._inside.add(key)
            self._known[key] = self._new_value(record, keys)
            self._inside.remove(key)
        return self._known[key]

    def _new_value(self, record: Any, keys: Keys) -> Any:
        kind = type(record)
        if kind is dict:
            return self.pairs(list(record.items()), keys)
        if kind in (list, tuple, set, frozenset):
            return kind(self.value(each, (*keys, str(i))) for i, each in enumerate(record))
        if not isinstance(record, _Named):
            what = _name_of(record) if isinstance(record, _Name) else "a storage"
            raise RefusedError(f"{_at(keys)} is {what}; only tensors and plain values are read")
        maker = _MAKERS.get(record.full_name)
        if maker is None:
            if not _of_megatron(record.full_name):
                raise RefusedError(f"{_at(keys)} is made by {record.full_name}")
            maker = _unknown
        try:
            return maker(self, record, keys)
        except (TypeError, ValueError, AttributeError) as error:
            first = f"{error}".partition("\n")[0]
            raise RefusedError(f"{_at(keys)} is no usable {record.full_name}: {first}") from error

    def pairs(self, items: list[tuple[Any, Any]], keys: Keys) -> dict[Any, Any]:
        """A dictionary of the values of `items`."""
        pairs = {}
        for key, item in items:
            key = self.value(key, keys)
            pairs[key] = self.value(item, (*keys, str(key)))
        return pairs


_Maker = Callable[[_Translator, _Named, Keys], Any]


def _namespace(to: _Translator, call: _Named, keys: Keys) -> argparse.Namespace:
    state = call.state or {}
    if call.arguments or type(state) is not dict or not all(type(name) is str for name in state):
        raise ValueError("not made of names and values")
    space = argparse.Namespace()
    vars(space).update(to.pairs(list(state.items()), keys))
    return space


def _ordered_dict(to: _Translator, call: _Named, keys: Keys) -> dict[Any, Any]:
    # The state, left out, is an attribute: versions of layers, in the `state_dict` of a module.
    # Python 2 passed the pairs as one argument.
    (pairs,) = call.arguments or ([],)
    return to.pairs([*map(tuple, pairs), *call.items], keys)


def _default_dict(to: _Translator, call: _Named, keys: Keys) -> dict[Any, Any]:
    (factory,) = call.arguments or (None,)
    if factory is not None and _name_of(factory) not in _FACTORIES:
        raise ValueError("its values are made by something else than a plain type")
    return to.pairs(call.items, keys)


def _set(to: _Translator, call: _Named, keys: Keys) -> set[Any] | frozenset[Any]:
    (members,) = call.arguments or ([],)
    kind = set if call.full_name == "builtins.set" else frozenset
    return kind(to.value(members, keys))


def _complex(to: _Translator, call: _Named, keys: Keys) -> complex:
    real, imaginary = call.arguments
    return complex(_expect(float, real), _expect(float, imaginary))


def _no_bytes(to: _Translator, call: _Named, keys: Keys) -> bytes:
    if call.arguments:
        raise ValueError("called with arguments")
    return b""


def _encoded(to: _Translator, call: _Named, keys: Keys) -> bytes:
    """Bytes, which a pickle of protocol 2 holds as text."""
    text, encoding = call.arguments
    if encoding != "latin1":
        raise ValueError(f"encoding {encoding!r}")
    return _expect(str, text).encode("latin1")


def _size(to: _Translator, call: _Named, keys: Keys) -> tuple[int, ...]:
    (sizes,) = call.arguments
    if not _counts(*sizes):
        raise ValueError("sizes that are no counts")
    return tuple(sizes)


def _device(to: _Translator, call: _Named, keys: Keys) -> torch.device:
    kind, *index = call.arguments
    try:
        return torch.device(_expect(str, kind), *(_expect(int, each) for each in index))
    except RuntimeError as error:
        raise ValueError(f"{error}") from error


def _numpy_dtype(to: _Translator, call: _Named, keys: Keys) -> np.dtype[Any]:
    code = _expect(str, call.arguments[0])
    if not _NUMPY_CODE.fullmatch(code):
        raise ValueError(f"type {code!r} is none of numbers or text")
    _, order, *inner = call.state or (None, "|")
    if any(each is not None for each in inner[:3]):
        raise ValueError("a type of fields")
    if order not in ("<", ">", "|", "="):
        raise ValueError(f"order of bytes {order!r}")
    return np.dtype(order + code)


def _array(to: _Translator, call: _Named, keys: Keys) -> np.ndarray[Any, Any]:
    _, shape, dtype, by_columns, data = (to.value(each, keys) for each in call.state)
    return _numbers(shape, dtype, "F" if by_columns else "C", data)


def _scalar(to: _Translator, call: _Named, keys: Keys) -> Any:
    dtype, data = (to.value(each, keys) for each in call.arguments)
    return _numbers((), dtype, "C", data).item()


def _array_of_bytes(to: _Translator, call: _Named, keys: Keys) -> np.ndarray[Any, Any]:
    """An array in a pickle of protocol 5."""
    data, dtype, shape, order = (to.value(each, keys) for each in call.arguments)
    return _numbers(shape, dtype, order, data)


def _numbers(shape: Any, dtype: Any, order: Any, data: Any) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes | bytearray):
        raise TypeError(f"{_name_of(dtype)} of {_name_of(data)}")
    if not _counts(*shape) or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for {shape} of {dtype}")
    array = np.ndarray(shape, dtype, buffer=data, order=order)
    return array.astype(dtype.newbyteorder("="), order=order)


def _tensor(to: _Translator, call: _Named, keys: Keys) -> Any:
    storage, start, shape, stride, *others = call.arguments
    if any(others[2:]):
        raise ValueError("a view that conjugates or negates")
    storage = _expect(StorageView, storage)
    if not _counts(start, *shape, *stride) or len(shape) != len(stride):
        raise ValueError(f"{shape} with strides {stride} at {start}")
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and start + last >= storage.length:
        raise ValueError(f"{tuple(shape)} at {start} leaves a storage of {storage.length} elements")
    found = TensorFound(_at(keys), storage, storage.start + start, tuple(shape), tuple(stride))
    return to.make_tensor(found)


def _parameter(to: _Translator, call: _Named, keys: Keys) -> Any:
    return to.value(call.arguments[0], keys)


def _tensor_with_attributes(to: _Translator, call: _Named, keys: Keys) -> Any:
    """A tensor that Megatron-LM has put attributes on, such as `partition_dim`."""
    function, kind, arguments, _ = call.arguments
    if _name_of(function) not in _REBUILT or _name_of(kind) not in _TENSOR_TYPES:
        raise ValueError(f"{_name_of(kind)} made by {_name_of(function)}")
    return _MAKERS[_name_of(function)](to, function(*arguments), keys)


def _unknown(to: _Translator, call: _Named, keys: Keys) -> Unknown:
    module, _, name = call.full_name.rpartition(".")
    return Unknown(module, name, tuple(to.value(each, keys) for each in call.arguments))


def _of_megatron(module: str) -> bool:
    # The first versions of Megatron-LM had their loss scaler in a module at the top.
    return f"{module}.".startswith(("megatron.", "fp16.loss_scaler."))


def _name_of(record: Any) -> str:
    if isinstance(record, _Name):
        return vars(record)["full_name"]
    return type(record).__name__


def _at(keys: Keys) -> str:
    return ".".join(keys) or "the whole content"


def _counts(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _expect(kind: type[_T], value: Any) -> _T:
    if type(value) is not kind:
        raise TypeError(f"{_name_of(value)} where {kind.__name__} belongs")
    return value


_NUMPY_CODE = re.compile(r"[biufcSU][0-9]+")
_FACTORIES = {f"builtins.{name}" for name in ("list", "dict", "set", "int", "float", "str")}
_FACTORIES.add("collections.OrderedDict")
_TENSOR_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter"}
_BARE = {"numpy.ndarray", *_FACTORIES, *_TENSOR_TYPES}  # named, never called
_REBUILT = {f"torch._utils._rebuild_{what}" for what in ("tensor", "tensor_v2", "parameter")}
_MAKERS: dict[str, _Maker] = {
    "_codecs.encode": _encoded,
    "argparse.Namespace": _namespace,
    "builtins.bytes": _no_bytes,
    "builtins.complex": _complex,
    "builtins.frozenset": _set,
    "builtins.set": _set,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array_of_bytes,
    "numpy.dtype": _numpy_dtype,
    "torch.Size": _size,
    "torch.device": _device,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
}
