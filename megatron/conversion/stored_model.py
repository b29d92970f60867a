"""A model as it lies on disk, in terms that belong to no format.

Every reader makes a `StoredModel` and every writer takes one, so that three readers and three
writers are all there is to nine directions. Its tensors have our global names and true shapes and
are read one at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from megatron.checkpoint.tensor_source import TensorSource
from megatron.config import Config, ModelConfig


@dataclass(frozen=True)
class TokenizerFiles:
    """What came with a model for its tokenizer.

    type: the value of --tokenizer-type, where it can be told; the files that its kind needs by the
    names of their flags; others: the other files of a Hugging Face directory that concern it.
    """

    type: str | None = None
    vocab_file: Path | None = None
    merge_file: Path | None = None
    tokenizer_model: Path | None = None
    others: tuple[Path, ...] = ()

    _FIELDS: ClassVar = ("vocab_file", "merge_file", "tokenizer_model")

    @property
    def named(self) -> dict[str, Path]:
        """The files that a flag names, by the flag's field."""
        files = {name: getattr(self, name) for name in self._FIELDS}
        return {name: file for name, file in files.items() if file is not None}

    @property
    def flags(self) -> dict[str, Any]:
        """What the flags of a run say of it, by their fields."""
        files = {name: file.name for name, file in self.named.items()}
        return {"tokenizer_type": self.type, **dict.fromkeys(self._FIELDS), **files}


@dataclass(frozen=True)
class StoredModel:
    """A model on disk.

    format: native, megatron or hf; path: the directory or file that holds it; model: what it
    computes; source: its tensors under our names; iteration: None where the format knows none;
    config: the run's whole configuration, where it is known; facts: what else the format says that
    a certificate should; notes: what a reader of the certificate should know.
    """

    format: str
    path: Path
    model: ModelConfig
    source: TensorSource
    iteration: int | None = None
    tokenizer: TokenizerFiles = TokenizerFiles()
    config: Config | None = None
    run_state: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in memory."""
        source = self.source
        return sum(
            math.prod(shape) * source.dtypes[name].itemsize for name, shape in source.shapes.items()
        )

    def with_tokenizer(self, tokenizer: TokenizerFiles) -> StoredModel:
        """This model with another tokenizer."""
        config = self.config
        if config is not None:
            data = dataclasses.replace(config.data, **tokenizer.flags)
            config = dataclasses.replace(config, data=data)
        return dataclasses.replace(self, tokenizer=tokenizer, config=config)

    def with_dtype(self, dtype: torch.dtype) -> StoredModel:
        """This model with its values rounded to `dtype` as they are read."""
        found = sorted({str(d).removeprefix("torch.") for d in self.source.dtypes.values()})
        name = str(dtype).removeprefix("torch.")
        if found == [name]:
            return self
        note = f"values were converted from {', '.join(found)} to {name}"
        return dataclasses.replace(
            self,
            model=of_dtypes(self.model, [dtype]),
            source=_Converted(self.source, dtype),
            notes=(*self.notes, note),
        )


def of_dtypes(model: ModelConfig, dtypes: Iterable[torch.dtype]) -> ModelConfig:
    """The configuration of a model whose weights are stored so; of float32 where they are mixed."""
    kinds = set(dtypes)
    (dtype,) = kinds if len(kinds) == 1 else (torch.float32,)
    return dataclasses.replace(
        model,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        fp64=dtype == torch.float64,
    )


class _Converted:
    """Another source's tensors in one data type."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source = source
        self.shapes = source.shapes
        self.dtypes = dict.fromkeys(source.shapes, dtype)

    def read(self, name: str, /) -> torch.Tensor:
        return self._source.read(name).to(self.dtypes[name])


class Counted:
    """Another source's tensors, telling `on_bytes` how many bytes have been read so far."""

    def __init__(self, source: TensorSource, on_bytes: Callable[[int], None]) -> None:
        self._source, self._on_bytes = source, on_bytes
        self.shapes, self.dtypes = source.shapes, source.dtypes
        self._count = 0

    def read(self, name: str, /) -> torch.Tensor:
        """See `TensorSource`."""
        tensor = self._source.read(name)
        self._count += tensor.nbytes
        self._on_bytes(self._count)
        return tensor
