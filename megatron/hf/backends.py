"""Packages that only some features need, and what happens where they are absent.

Nothing of this package needs them to be imported. What does need one asks for it when it is used,
and then `requires_backends` says in one error which package is missing and for what. The classes of
`transformers` that are passed on as they are, its tokenizers, are stood in for by classes that say
the same as soon as anything is done with them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NoReturn

_INSTALLED_AS = {"huggingface_hub": "huggingface-hub"}

# The tokenizers of the families here.
TOKENIZERS = ("AutoTokenizer", "BertTokenizer", "BertTokenizerFast")


def is_available(backend: str) -> bool:
    """Whether a package can be imported; it is not imported."""
    return importlib.util.find_spec(backend) is not None


def requires_backends(obj: object, backends: str | Iterable[str]) -> None:
    """Raise where a package that `obj`, a class, an object of it, or a name, needs is absent.

    Raises:
        ImportError: names the object and all absent packages.
    """
    names = [backends] if isinstance(backends, str) else list(backends)
    missing = [name for name in names if not is_available(name)]
    if missing:
        install = " ".join(_INSTALLED_AS.get(name, name) for name in missing)
        raise ImportError(
            f"{_name_of(obj)} needs {', '.join(missing)}, which is not installed: "
            f"pip install {install}"
        )


def backend(name: str, obj: object) -> ModuleType:
    """The package, for `obj`, imported.

    Raises:
        ImportError: it is absent.
    """
    requires_backends(obj, name)
    return importlib.import_module(name)


class DummyObject(type):
    """Metaclass of classes that stand in for those of an absent package.

    A class names its packages in `_backends`. It can be imported, named and tested for; anything
    else raises the ImportError of `requires_backends`.
    """

    _backends: list[str]

    def __getattribute__(cls, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattribute__(name)
        return _refuse(cls)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _refuse(cls)


def dummy(name: str, backends: Iterable[str]) -> type:
    """A class of that name which stands in for one of absent packages."""
    return DummyObject(name, (), {"_backends": list(backends)})


def tokenizer_class(name: str) -> Any:
    """The class of `transformers`, one of TOKENIZERS, as it is; without that package a dummy."""
    if not is_available("transformers"):
        return dummy(name, ["transformers"])
    return getattr(importlib.import_module("transformers"), name)


def _refuse(cls: DummyObject) -> NoReturn:
    requires_backends(cls, cls._backends)
    # The package has been installed since the class was made.
    raise ImportError(f"{cls.__name__} is available after a restart")


def _name_of(obj: object) -> str:
    if isinstance(obj, str):
        return obj
    cls = obj if isinstance(obj, type) else type(obj)
    return str(getattr(obj, "__name__", cls.__name__))
