"""The architectures of Hugging Face's that this project reads and writes, found from either side.

megatron-bert   BERT with LayerNorm in front of blocks     BERT, --norm-position pre
bert            the original BERT                          BERT, --norm-position post
gpt2            GPT-2                                      GPT with learned positions
llama           Llama                                      GPT with rotary positions
t5              T5 1.0 and 1.1                             T5
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

from megatron.checkpoint.hugging_face.architecture import Architecture, Found
from megatron.checkpoint.hugging_face.bert import BertArchitecture, MegatronBertArchitecture
from megatron.checkpoint.hugging_face.gpt2 import GPT2Architecture
from megatron.checkpoint.hugging_face.llama import LlamaArchitecture
from megatron.checkpoint.hugging_face.t5 import T5Architecture
from megatron.checkpoint.name_map import Entry, OurTensors, Shape
from megatron.checkpoint.tensor_source import TensorSource
from megatron.config import ModelConfig
from megatron.errors import CheckpointError

Value = TypeVar("Value")

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        MegatronBertArchitecture(),
        BertArchitecture(),
        GPT2Architecture(),
        LlamaArchitecture(),
        T5Architecture(),
    )
}


@dataclass(frozen=True)
class OpenedModel:
    """A model of theirs in our terms: configuration, tensors by our names, and what to know.

    class_name: their class that holds these tensors.
    """

    model: ModelConfig
    tensors: OurTensors
    class_name: str
    notes: tuple[str, ...]


def architecture_of(hf: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json.

    Raises:
        CheckpointError: it is not known.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise CheckpointError(
            f"config.json: model_type is {kind!r}, expected one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[kind]


def architecture_for(model: ModelConfig) -> Architecture:
    """The architecture of theirs that is of our model's kind; `settings` checks the rest.

    Raises:
        CheckpointError: there is none with such positions.
    """
    if model.model_type == "t5":
        return ARCHITECTURES["t5"]
    if model.model_type == "bert":
        return ARCHITECTURES["bert" if model.norm_position == "post" else "megatron-bert"]
    kinds = {"learned_absolute": "gpt2", "rope": "llama"}
    if model.position_embedding_type not in kinds:
        raise CheckpointError(
            f"--position-embedding-type {model.position_embedding_type}: of Hugging Face's GPTs, "
            "GPT-2 knows only learned_absolute, Llama only rope"
        )
    return ARCHITECTURES[kinds[model.position_embedding_type]]


def model_config_of(hf: Mapping[str, Any]) -> ModelConfig:
    """Our configuration of the model that a config.json describes.

    Raises:
        CheckpointError: naming the field that is unknown, wrong or cannot be expressed.
    """
    return architecture_of(hf).model_config_of(hf)


def hugging_face_config(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    class_name: str | None = None,
    tokens: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The config.json of a model of ours.

    Args:
        dtype: type of the stored weights.
        class_name: their class; by default the one of the language model.
        tokens: ids of a tokenizer's special tokens, such as {"pad_token_id": 0}.

    Raises:
        CheckpointError: naming the field of ours that no architecture of theirs can express.
    """
    architecture = architecture_for(model)
    return {
        "architectures": [class_name or architecture.class_name],
        "model_type": architecture.model_type,
        **architecture.settings(model),
        **(tokens or {}),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def entries(model: ModelConfig) -> list[Entry]:
    """An entry for every tensor that a model has as it is trained, in the model's order."""
    return architecture_for(model).entries(model)


def is_ignorable(name: str, model: ModelConfig) -> bool:
    """Whether a tensor of theirs may be present without meaning: a buffer, or a tied duplicate."""
    return architecture_for(model).is_ignorable(name, model)


def open_hugging_face(hf: Mapping[str, Any], source: TensorSource) -> OpenedModel:
    """The model that a config.json and the tensors beside it are.

    Raises:
        CheckpointError: a field cannot be expressed; tensors are missing, not known, or no floating
            numbers.
    """
    architecture = architecture_of(hf)
    _expect_layers(architecture.model_config_of(hf), len(source.shapes))
    found = architecture.found(hf, source.shapes)
    stored = _Renamed(source, found.renamed)
    tensors = OurTensors(found.entries, stored)
    tensors.expect_floating()
    return OpenedModel(
        found.model, tensors, found.class_name, (*found.notes, *_widened(found, stored.dtypes))
    )


def _expect_layers(model: ModelConfig, tensors: int) -> None:
    """Raise before anything is made for each of more layers than there can be."""
    layers = model.num_layers + (model.decoder_layers if model.model_type == "t5" else 0)
    if layers > tensors:
        raise CheckpointError(f"config.json speaks of {layers} layers, found {tensors} tensors")


def _widened(found: Found, dtypes: Mapping[str, torch.dtype]) -> Iterator[str]:
    """A note where parts of one of our tensors are stored in different types."""
    mixed = [e.ours for e in found.entries if len({dtypes[name] for name in e.theirs}) > 1]
    if mixed:
        yield (
            f"the parts of {len(mixed)} tensors, such as {mixed[0]}, are stored in different "
            "types: they become one of the type that holds all their values"
        )


class _Renamed:
    """A `TensorSource` some of whose tensors have other names: `names` gives the stored ones."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """See `TensorSource`."""
        return self._under_new_names(self._source.shapes)

    @cached_property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """See `TensorSource`."""
        return self._under_new_names(self._source.dtypes)

    def read(self, name: str, /) -> torch.Tensor:
        """See `TensorSource`."""
        return self._source.read(self._names.get(name, name))

    def _under_new_names(self, values: Mapping[str, Value]) -> dict[str, Value]:
        return dict(values) | {new: values[old] for new, old in self._names.items()}
