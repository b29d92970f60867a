"""Configurations of the BERT families, as `transformers` writes and reads them in config.json.

A field is declared once, with its type and default, in the class it belongs to; constructor,
signature and file follow from that. Fields that nobody declared are kept and written back, so that
nothing is lost from a file that another release or program wrote.

Release 5 of `transformers` calls `torch_dtype` `dtype`; both are read, and the older name, which
all releases read, is written.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, overload

import torch

from megatron.errors import CheckpointError, ConfigError
from megatron.hf.hub import CONFIG_FILE, locate

logger = logging.getLogger(__name__)

_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_POSITIONS = ("absolute", "relative_key", "relative_key_query")
_NOT_WRITTEN = ("name_or_path",)


def _own_fields(cls: type) -> Iterator[tuple[str, str]]:
    """Name and type, as written, of the fields that a class itself declares."""
    for name, kind in inspect.get_annotations(cls).items():
        if not kind.startswith("ClassVar"):
            yield name, kind


def _declared(cls: type) -> dict[str, Any]:
    """The defaults of the fields that a class itself declares."""
    return {name: getattr(cls, name) for name, _ in _own_fields(cls)}


def _parameters(cls: type) -> Iterator[inspect.Parameter]:
    """The constructor's: the subclasses' fields, by position as well, then the shared ones."""
    kinds = inspect.Parameter
    lineage = [each for each in reversed(cls.__mro__) if hasattr(each, "model_type")]
    shared, *own = lineage
    for each, kind in [(each, kinds.POSITIONAL_OR_KEYWORD) for each in own] + [
        (shared, kinds.KEYWORD_ONLY)
    ]:
        for name, annotation in _own_fields(each):
            yield inspect.Parameter(name, kind, default=getattr(cls, name), annotation=annotation)
    yield inspect.Parameter("kwargs", kinds.VAR_KEYWORD)


class PretrainedConfig:
    """The fields that models of all kinds share, and how a configuration is read and written.

    Fields are attributes. Positional arguments are the fields of the subclass in their order;
    `num_labels` is an argument, too.

    Raises:
        ConfigError: a field holds what no model of any kind can have.
    """

    model_type: ClassVar[str] = ""

    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    torch_dtype: torch.dtype | None = None
    is_encoder_decoder: bool = False
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    chunk_size_feed_forward: int = 0
    pruned_heads: dict[int, list[int]] | None = None
    architectures: list[str] | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    sep_token_id: int | None = None
    name_or_path: str = ""

    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__signature__ = inspect.Signature(list(_parameters(cls)))

    def __init__(self, *values: Any, **fields: Any) -> None:
        bound = self.__signature__.bind(*values, **fields)
        bound.apply_defaults()
        unknown = bound.arguments.pop("kwargs")
        num_labels = unknown.pop("num_labels", None)
        unknown.pop("model_type", None)
        for name, value in {**bound.arguments, **_renamed(unknown)}.items():
            setattr(self, name, copy.deepcopy(value))
        self._set_labels(num_labels)
        if self.problem_type not in (None, *_PROBLEM_TYPES):
            raise ConfigError(
                f"problem_type: found {self.problem_type!r}, "
                f"expected one of {', '.join(_PROBLEM_TYPES)}"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("torch_dtype", "dtype"):
            name, value = "torch_dtype", _dtype(value)
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @property
    def dtype(self) -> torch.dtype | None:
        """The newer name of `torch_dtype`."""
        return self.torch_dtype

    @property
    def use_return_dict(self) -> bool:
        """Whether models return output objects; tuples otherwise."""
        return self.return_dict

    @property
    def num_labels(self) -> int:
        """Number of labels; setting it names them LABEL_0, LABEL_1 and so on."""
        assert self.id2label is not None
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label = {number: f"LABEL_{number}" for number in range(count)}
        self.label2id = {label: number for number, label in self.id2label.items()}

    def _set_labels(self, num_labels: int | None) -> None:
        """Make of whichever of names, numbers and count are known the others."""
        if self.id2label is not None:
            self.id2label = {int(number): label for number, label in self.id2label.items()}
        elif self.label2id is not None:
            self.id2label = {int(number): label for label, number in self.label2id.items()}
        else:
            self.num_labels = 2 if num_labels is None else num_labels
        assert self.id2label is not None
        if self.label2id is None:
            self.label2id = {label: number for number, label in self.id2label.items()}
        if num_labels not in (None, self.num_labels):
            logger.warning(
                "num_labels=%s is left aside: the labels have %s names", num_labels, self.num_labels
            )

    def update(self, fields: Mapping[str, Any]) -> None:
        """Set each of the fields."""
        for name, value in fields.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """All fields, `model_type` included, as plain values."""
        fields = {**vars(self), "model_type": self.model_type}
        if isinstance(fields["torch_dtype"], torch.dtype):
            fields["torch_dtype"] = str(fields["torch_dtype"]).removeprefix("torch.")
        return copy.deepcopy(fields)

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields of config.json: of the shared ones those that differ from their defaults."""
        usual = {**_declared(PretrainedConfig), **_USUAL_LABELS}
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in _NOT_WRITTEN and not (name in usual and value == usual[name])
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of config.json; with `use_diff=False` of all fields."""
        fields = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write `to_json_string` into a file."""
        Path(json_file_path).write_text(self.to_json_string(use_diff), encoding="utf-8")

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write config.json into the directory, which is made where it does not exist."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.to_json_file(directory / CONFIG_FILE)

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """The configuration that a file holds.

        Raises:
            CheckpointError: the file is missing or holds no JSON object.
        """
        return cls.from_dict(_read(Path(json_file)))

    @overload
    @classmethod
    def from_dict(
        cls,
        config_dict: Mapping[str, Any],
        return_unused_kwargs: Literal[False] = False,
        **overrides: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_dict(
        cls,
        config_dict: Mapping[str, Any],
        return_unused_kwargs: Literal[True],
        **overrides: Any,
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_dict(
        cls,
        config_dict: Mapping[str, Any],
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """The configuration of the given fields, with the overrides that name one of its fields.

        Returns:
            the configuration, and with `return_unused_kwargs` the other overrides.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            logger.warning(
                "%s is for models of type %r, and the configuration is of a %r",
                cls.__name__,
                cls.model_type,
                found,
            )
        config = cls(**config_dict)
        used = {name: value for name, value in overrides.items() if hasattr(config, name)}
        config.update(used)
        config._set_labels(None)
        if not return_unused_kwargs:
            return config
        return config, {name: overrides[name] for name in overrides if name not in used}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        return_unused_kwargs: bool = False,
        cache_dir: str | Path | None = None,
        revision: str = "main",
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str = "",
        **overrides: Any,
    ) -> Any:
        """The configuration in a directory, a file, or a model of the Hugging Face hub.

        Returns:
            as `from_dict` does.

        Raises:
            CheckpointError: there is none, or it is damaged.
            ImportError: it is not a local path, and huggingface_hub is not installed.
        """
        path = Path(pretrained_model_name_or_path)
        if not path.is_file():
            directory = locate(
                pretrained_model_name_or_path,
                [CONFIG_FILE],
                cls.__name__,
                cache_dir=cache_dir,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
                subfolder=subfolder,
            )
            path = directory / CONFIG_FILE
        fields = _read(path) | {"name_or_path": str(pretrained_model_name_or_path)}
        if return_unused_kwargs:
            return cls.from_dict(fields, True, **overrides)
        return cls.from_dict(fields, **overrides)


class BertFamilyConfig(PretrainedConfig):
    """The network of a BERT, whichever place its LayerNorms have.

    Attributes:
        hidden_act: activation of the MLPs and of the masked-LM head.
        position_embedding_type: "absolute", "relative_key" (arXiv 1803.02155) or
            "relative_key_query" (arXiv 2009.13658).
        is_decoder: whether a position sees only those before it.
        add_cross_attention: whether a decoder's layers attend to an encoder's output, too.
        use_cache: whether a decoder returns its keys and values.
        chunk_size_feed_forward: accepted and without effect: results do not depend on it.
    """

    # Whether the padding token's row of the word embedding starts as zeros.
    pads_with_zeros: ClassVar[bool] = False

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    use_cache: bool = True

    def check(self) -> None:
        """Whether a model can be built.

        Raises:
            ConfigError: it cannot; a line for each reason.
        """
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> Iterator[str]:
        heads = self.num_attention_heads
        if heads < 1 or self.hidden_size % heads:
            yield f"hidden_size: {self.hidden_size} is not divisible by num_attention_heads {heads}"
        if self.position_embedding_type not in _POSITIONS:
            yield (
                f"position_embedding_type: found {self.position_embedding_type!r}, "
                f"expected one of {', '.join(_POSITIONS)}"
            )
        if self.add_cross_attention and not self.is_decoder:
            yield "add_cross_attention: only a decoder has cross attention, set is_decoder=True"
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            yield f"pad_token_id: {self.pad_token_id} is not below vocab_size {self.vocab_size}"
        if self.pruned_heads:
            yield f"pruned_heads: found {self.pruned_heads}, and all heads are kept here"


class BertConfig(BertFamilyConfig):
    """The original BERT (arXiv 1810.04805); the defaults are BERT base's.

    Attributes:
        classifier_dropout: dropout in front of classifiers; `hidden_dropout_prob` where None.
    """

    model_type = "bert"
    pads_with_zeros = True

    classifier_dropout: float | None = None


class MegatronBertConfig(BertFamilyConfig):
    """MegatronBERT (arXiv 1909.08053); the defaults are those of the model of 345M parameters."""

    model_type = "megatron-bert"

    vocab_size = 29056
    hidden_size = 1024
    num_hidden_layers = 24
    num_attention_heads = 16
    intermediate_size = 4096


_USUAL_LABELS = {
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
}


def _renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields under the names that they have here."""
    names = {"dtype": "torch_dtype", "_name_or_path": "name_or_path"}
    return {names.get(name, name): value for name, value in fields.items()}


def _dtype(value: Any) -> torch.dtype | None:
    """The number format that a file or a user names."""
    if value is None or isinstance(value, torch.dtype):
        return value
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"torch_dtype: found {value!r}, expected the name of a torch type")
    return dtype


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        fields = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: found {type(fields).__name__}, expected a JSON object")
    return fields
