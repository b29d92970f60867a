"""Weights that BERT's original programs stored with TensorFlow 1.

A variable's name is a path of scopes, and little about it differs from Hugging Face's names::

    bert/encoder/layer_0/attention/self/query/kernel   [in, out] where a weight is [out, in]
    bert.encoder.layer.0.attention.self.query.weight

    bert/embeddings/LayerNorm/gamma                    bert.embeddings.LayerNorm.weight
    cls/predictions/output_bias                        cls.predictions.bias

The programs for fine-tuning called a classifier's tensors `output_weights` and `output_bias`, with
no scope, and those of question answering `cls/squad/output_weights` and `output_bias`. What an
optimizer kept beside the variables is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from megatron.checkpoint.tensor_source import TensorSource
from megatron.errors import CheckpointError
from megatron.hf.backends import backend

_OPTIMIZERS = re.compile(r"(^|/)(adam_[mv]|Adam\w*|LAMB\w*|global_step)(/|_|$)")
_LAST = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "output_weights": "weight",
    "output_bias": "bias",
}
_HEADS = {
    "output_weights": "classifier.weight",
    "output_bias": "classifier.bias",
    "cls/squad/output_weights": "qa_outputs.weight",
    "cls/squad/output_bias": "qa_outputs.bias",
}


def hugging_face_name(variable: str) -> str | None:
    """Hugging Face's name of a variable; None of one that is no weight."""
    if _OPTIMIZERS.search(variable):
        return None
    if variable in _HEADS:
        return _HEADS[variable]
    *scopes, last = re.sub(r"layer_(\d+)", r"layer/\1", variable).split("/")
    if last.endswith("_embeddings"):
        scopes, last = [*scopes, last], "weight"
    return ".".join([*scopes, _LAST.get(last, last)])


def is_transposed(variable: str) -> bool:
    """Whether a variable is [in, out]."""
    return variable.endswith("/kernel")


class Reader(Protocol):
    """What TensorFlow's `load_checkpoint` returns."""

    def get_variable_to_shape_map(self) -> Mapping[str, list[int]]:
        """The shape of each variable."""

    def get_tensor(self, name: str, /) -> np.ndarray[Any, Any]:
        """A variable's value."""


class TensorFlowCheckpoint:
    """The weights of a checkpoint by Hugging Face's names, as a `TensorSource`.

    Raises:
        CheckpointError: it has no word embeddings, so it is no BERT of those programs.
    """

    def __init__(self, reader: Reader, path: str | Path = "the checkpoint") -> None:
        self._reader = reader
        self._variables = {
            name: variable
            for variable in reader.get_variable_to_shape_map()
            if (name := hugging_face_name(variable)) is not None
        }
        if not any(name.endswith("word_embeddings.weight") for name in self._variables):
            raise CheckpointError(
                f"{path}: found {len(self._variables)} variables, "
                "expected bert/embeddings/word_embeddings among them"
            )

    @classmethod
    def open(cls, path: str | Path, user: object) -> TensorFlowCheckpoint:
        """The checkpoint with a prefix such as model.ckpt, its .index file, or in a directory.

        Raises:
            ImportError: tensorflow is not installed; names `user`.
            CheckpointError: there is none, or it is no BERT.
        """
        tensorflow = backend("tensorflow", user)
        prefix = Path(path)
        if prefix.is_dir():
            prefix = prefix / "model.ckpt"
        prefix = prefix.with_name(prefix.name.removesuffix(".index"))
        if not prefix.with_name(f"{prefix.name}.index").is_file():
            raise CheckpointError(f"{prefix}.index is missing; expected a TensorFlow checkpoint")
        return cls(tensorflow.train.load_checkpoint(str(prefix)), path)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight."""
        theirs = self._reader.get_variable_to_shape_map()
        return {
            name: tuple(theirs[variable][:: -1 if is_transposed(variable) else 1])
            for name, variable in self._variables.items()
        }

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The type of every weight; those programs computed in float32."""
        return dict.fromkeys(self._variables, torch.float32)

    def read(self, name: str) -> torch.Tensor:
        """One weight."""
        variable = self._variables[name]
        value = torch.from_numpy(np.array(self._reader.get_tensor(variable), dtype=np.float32))
        return value.t().contiguous() if is_transposed(variable) else value


class _Model(Protocol):
    def load_tensors(self, source: TensorSource) -> object: ...


AnyModel = TypeVar("AnyModel", bound=_Model)


def load_tf_weights(model: AnyModel, config: object, tf_checkpoint_path: str | Path) -> AnyModel:
    """Fill a model from a checkpoint; `config`, the model's own, is there for convention's sake.

    Raises:
        ImportError: tensorflow is not installed.
        CheckpointError: there is no checkpoint, or a tensor of it has another shape.
    """
    model.load_tensors(TensorFlowCheckpoint.open(tf_checkpoint_path, model))
    return model
