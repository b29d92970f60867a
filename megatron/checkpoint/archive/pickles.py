"""The pickle inside a `torch.save` file: tensors and plain values of it, and nothing else.

`record` notes what the pickle asks for. For every name in `_MAKERS` it is known here what
may have been noted with it, and which value that stands for; all else is refused by name.

Enumerations of Megatron-LM, which saved arguments hold, and its loss scaler become `Unknown`: their
name and the arguments of the call, nothing of what they can do.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch

from megatron.checkpoint.archive.record import (
    Call,
    Name,
    RefusedError,
    StorageView,
    are_counts,
    name_of,
    record_pickle,
)

_T = TypeVar("_T")
Keys = tuple[str, ...]  # the keys that lead to a value

_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype)


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
    record, storages = record_pickle(stream, _allowed)
    return _Translator(make).value(record, ()), storages


class _Translator:
    """Turns records into values; what a pickle holds twice comes out as one object, too."""

    def __init__(self, make_tensor: Callable[[TensorFound], Any]) -> None:
        self.make_tensor = make_tensor
        # By the identity of a record, which is kept as well, or another could take its identity.
        self._known: dict[int, tuple[Any, Any]] = {}
        self._inside: set[int] = set()

    def value(self, record: Any, keys: Keys) -> Any:
        """The value of a record found at `keys`."""
        if type(record) in _PLAIN:
            return record
        key = id(record)
        if key in self._inside:
            raise RefusedError(f"{_at(keys)} holds itself")
        if key not in self._known:
            self._inside.add(key)
            self._known[key] = record, self._new_value(record, keys)
            self._inside.remove(key)
        return self._known[key][1]

    def _new_value(self, record: Any, keys: Keys) -> Any:
        kind = type(record)
        if kind is dict:
            return self.pairs(list(record.items()), keys)
        if kind in (list, tuple, set, frozenset):
            return kind(self.value(each, (*keys, str(i))) for i, each in enumerate(record))
        if not isinstance(record, Call):
            what = name_of(record) if isinstance(record, Name) else "a storage"
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


_Maker = Callable[[_Translator, Call, Keys], Any]


def _namespace(to: _Translator, call: Call, keys: Keys) -> argparse.Namespace:
    state = call.state or {}
    if call.arguments or type(state) is not dict or not all(type(name) is str for name in state):
        raise ValueError("not made of names and values")
    space = argparse.Namespace()
    vars(space).update(to.pairs(list(state.items()), keys))
    return space


def _ordered_dict(to: _Translator, call: Call, keys: Keys) -> dict[Any, Any]:
    # The state, left out, is an attribute: versions of layers, in the `state_dict` of a module.
    # Python 2 passed the pairs as one argument.
    (pairs,) = call.arguments or ([],)
    return to.pairs([*map(tuple, pairs), *call.items], keys)


def _default_dict(to: _Translator, call: Call, keys: Keys) -> dict[Any, Any]:
    (factory,) = call.arguments or (None,)
    if factory is not None and name_of(factory) not in _FACTORIES:
        raise ValueError("its values are made by something else than a plain type")
    return to.pairs(call.items, keys)


def _set(to: _Translator, call: Call, keys: Keys) -> set[Any] | frozenset[Any]:
    (members,) = call.arguments or ([],)
    kind = set if call.full_name == "builtins.set" else frozenset
    return kind(to.value(members, keys))


def _complex(to: _Translator, call: Call, keys: Keys) -> complex:
    real, imaginary = call.arguments
    return complex(_expect(float, real), _expect(float, imaginary))


def _no_bytes(to: _Translator, call: Call, keys: Keys) -> bytes:
    if call.arguments:
        raise ValueError("called with arguments")
    return b""


def _encoded(to: _Translator, call: Call, keys: Keys) -> bytes:
    """Bytes, which a pickle of protocol 2 holds as text."""
    text, encoding = call.arguments
    if encoding != "latin1":
        raise ValueError(f"encoding {encoding!r}")
    return _expect(str, text).encode("latin1")


def _size(to: _Translator, call: Call, keys: Keys) -> tuple[int, ...]:
    (sizes,) = call.arguments
    if not are_counts(*sizes):
        raise ValueError("sizes that are no counts")
    return tuple(sizes)


def _device(to: _Translator, call: Call, keys: Keys) -> torch.device:
    kind, *index = call.arguments
    try:
        return torch.device(_expect(str, kind), *(_expect(int, each) for each in index))
    except RuntimeError as error:
        raise ValueError(f"{error}") from error


def _numpy_dtype(to: _Translator, call: Call, keys: Keys) -> np.dtype[Any]:
    code = _expect(str, call.arguments[0])
    if not _NUMPY_CODE.fullmatch(code):
        raise ValueError(f"type {code!r} is none of numbers or text")
    _, order, *inner = call.state or (None, "|")
    if any(each is not None for each in inner[:3]):
        raise ValueError("a type of fields")
    if order not in ("<", ">", "|", "="):
        raise ValueError(f"order of bytes {order!r}")
    return np.dtype(order + code)


def _array(to: _Translator, call: Call, keys: Keys) -> np.ndarray[Any, Any]:
    _, shape, dtype, by_columns, data = (to.value(each, keys) for each in call.state)
    return _numbers(shape, dtype, "F" if by_columns else "C", data)


def _scalar(to: _Translator, call: Call, keys: Keys) -> Any:
    dtype, data = (to.value(each, keys) for each in call.arguments)
    return _numbers((), dtype, "C", data).item()


def _array_of_bytes(to: _Translator, call: Call, keys: Keys) -> np.ndarray[Any, Any]:
    """An array in a pickle of protocol 5."""
    data, dtype, shape, order = (to.value(each, keys) for each in call.arguments)
    return _numbers(shape, dtype, order, data)


def _numbers(shape: Any, dtype: Any, order: Any, data: Any) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes | bytearray):
        raise TypeError(f"{name_of(dtype)} of {name_of(data)}")
    if not are_counts(*shape) or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for {shape} of {dtype}")
    array = np.ndarray(shape, dtype, buffer=data, order=order)
    return array.astype(dtype.newbyteorder("="), order=order)


def _tensor(to: _Translator, call: Call, keys: Keys) -> Any:
    storage, start, shape, stride, *others = call.arguments
    if any(others[2:]):
        raise ValueError("a view that conjugates or negates")
    storage = _expect(StorageView, storage)
    if not are_counts(start, *shape, *stride) or len(shape) != len(stride):
        raise ValueError(f"{shape} with strides {stride} at {start}")
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and start + last >= storage.length:
        raise ValueError(f"{tuple(shape)} at {start} leaves a storage of {storage.length} elements")
    found = TensorFound(_at(keys), storage, storage.start + start, tuple(shape), tuple(stride))
    return to.make_tensor(found)


def _parameter(to: _Translator, call: Call, keys: Keys) -> Any:
    return to.value(call.arguments[0], keys)


def _tensor_with_attributes(to: _Translator, call: Call, keys: Keys) -> Any:
    """A tensor that Megatron-LM has put attributes on, such as `partition_dim`."""
    function, kind, arguments, _ = call.arguments
    if name_of(function) not in _REBUILT or name_of(kind) not in _TENSOR_TYPES:
        raise ValueError(f"{name_of(kind)} made by {name_of(function)}")
    return _MAKERS[name_of(function)](to, function(*arguments), keys)


def _unknown(to: _Translator, call: Call, keys: Keys) -> Unknown:
    module, _, name = call.full_name.rpartition(".")
    return Unknown(module, name, tuple(to.value(each, keys) for each in call.arguments))


def _allowed(name: str) -> bool:
    return name in _MAKERS or name in _BARE or _of_megatron(name)


def _of_megatron(name: str) -> bool:
    # The first versions of Megatron-LM had their loss scaler in a module at the top.
    return name.startswith(("megatron.", "fp16.loss_scaler."))


def _at(keys: Keys) -> str:
    return ".".join(keys) or "the whole content"


def _expect(kind: type[_T], value: Any) -> _T:
    if type(value) is not kind:
        raise TypeError(f"{name_of(value)} where {kind.__name__} belongs")
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
    "types.SimpleNamespace": _namespace,  # transformers writes Megatron-LM's arguments so
}
