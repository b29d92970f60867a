"""What is known of one architecture of Hugging Face's, and how its config.json is read.

An `Architecture` goes both ways. From theirs to ours it says what `ModelConfig` a config.json
means, and which entries of the map a set of tensors answers to. From ours to theirs it says what
config.json a model has, which class holds it, and what is written beside the map's tensors. What
one side cannot express is refused by the name of the field that says it; what changes training
alone, or an activation where one name stands for two, becomes a note.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron.checkpoint.name_map import Entry, Shape, missing, unknown
from megatron.config import ModelConfig, all_flags
from megatron.config.flags import in_interval
from megatron.config.model import ACTIVATIONS
from megatron.errors import CheckpointError

# Their names of our activations, the one that is written first; the others have one name on both
# sides. Several of their names are one formula.
_THEIR_ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": (
        "gelu_new",
        "gelu_accurate",
        "gelu_fast",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
    ),
    "silu": ("silu", "swish"),
}
_OUR_ACTIVATIONS = {
    their: ours for ours in ACTIVATIONS for their in _THEIR_ACTIVATIONS.get(ours, (ours,))
}


def their_activation(ours: str) -> str:
    """Their name of our activation."""
    return _THEIR_ACTIVATIONS.get(ours, (ours,))[0]


class Fields:
    """The fields of a config.json; where one is not there or null, its default.

    Args:
        aliases: other names that a field may have.

    All methods raise CheckpointError naming the field, what is found and what is expected.
    """

    def __init__(
        self,
        hf: Mapping[str, Any],
        defaults: Mapping[str, Any],
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self._hf, self._defaults, self._aliases = hf, defaults, aliases or {}

    def __getitem__(self, name: str) -> Any:
        for key in (name, self._aliases.get(name, name)):
            if self._hf.get(key) is not None:
                return self._hf[key]
        return self._defaults.get(name)

    def count(self, name: str) -> int:
        """A whole number from 1 on."""
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refusal(name, "a whole number from 1 on")
        return value

    def number(self, name: str, interval: str) -> float:
        """A number in an interval such as "[0, 1)"."""
        value = self[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not in_interval(value, interval):
            raise self.refusal(name, f"a number in {interval}")
        return float(value)

    def truth(self, name: str) -> bool:
        """True or false."""
        value = self[name]
        if not isinstance(value, bool):
            raise self.refusal(name, "true or false")
        return value

    def choice(self, name: str, choices: Mapping[str, str]) -> str:
        """What a field's text means by a table."""
        value = self[name]
        if not isinstance(value, str) or value not in choices:
            raise self.refusal(name, f"one of {', '.join(choices)}")
        return choices[value]

    def activation(self, name: str) -> str:
        """Our name of an activation."""
        return self.choice(name, _OUR_ACTIVATIONS)

    def expect(self, known: Mapping[str, Any]) -> None:
        """Raise where fields that change the mathematics are not as our models know them."""
        wrong = [
            self.refusal(name, repr(value)) for name, value in known.items() if self[name] != value
        ]
        if wrong:
            raise CheckpointError(problem for error in wrong for problem in error.problems)

    def refusal(self, name: str, expected: str) -> CheckpointError:
        """The error for a field whose value will not do."""
        return CheckpointError(f"config.json: {name} is {self[name]!r}, expected {expected}")


def require(name: str, model: ModelConfig, known: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise CheckpointError for each field of ours with a value that an architecture lacks.

    Args:
        name: the architecture's.
        known: for each field the values that can be expressed.
    """
    problems = [
        f"{all_flags()[fieldname].option} {getattr(model, fieldname)}: "
        f"{name} knows only {' or '.join(map(str, values))}"
        for fieldname, values in known.items()
        if getattr(model, fieldname) not in values
    ]
    if problems:
        raise CheckpointError(problems)


def require_whole_heads(name: str, model: ModelConfig) -> None:
    """Raise CheckpointError where heads do not share the hidden size evenly."""
    if model.head_size * model.num_attention_heads != model.hidden_size:
        raise CheckpointError(
            f"--kv-channels {model.kv_channels}: {name} knows only heads of hidden-size "
            f"{model.hidden_size} / num-attention-heads {model.num_attention_heads}"
        )


def require_usual_scale(name: str, model: ModelConfig) -> None:
    """Raise CheckpointError where attention scores are not divided by sqrt(head size)."""
    if not has_usual_scale(model):
        raise CheckpointError(
            f"--attention-scale {model.attention_scale}: {name} knows only "
            f"1 / sqrt({model.head_size})"
        )


def has_usual_scale(model: ModelConfig) -> bool:
    """Whether attention scores are divided by sqrt(head size)."""
    usual = model.head_size**-0.5
    return model.attention_scale is None or math.isclose(model.attention_scale, usual)


@dataclass(frozen=True)
class Written:
    """What is written of a model, beside its settings.

    Attributes:
        class_name: their class that holds it.
        copies: further names, and for each the written tensor that it holds again.
        zeros: tensors that their class has and does not use, with their shapes.
        notes: what a reader of the model should know.
    """

    class_name: str
    entries: list[Entry]
    copies: Mapping[str, str] = field(default_factory=dict)
    zeros: Mapping[str, Shape] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """What is found in their files.

    Attributes:
        model: the configuration, where the tensors say more than config.json.
        class_name: their class that holds these tensors.
        renamed: for a name of the map, the name that the files have.
        notes: what a reader of the model should know.
    """

    model: ModelConfig
    entries: list[Entry]
    class_name: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Architecture(ABC):
    """One architecture of theirs, in both directions.

    Attributes:
        model_type: its name in config.json.
        stem: what the names of its classes begin with.
        class_name: the class that holds a language model of it.
        prefix: what the names of that class have in front of those of the bare network.
    """

    model_type: ClassVar[str]
    stem: ClassVar[str]
    class_name: ClassVar[str]
    prefix: ClassVar[str]

    @abstractmethod
    def model_config_of(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Our configuration of their model.

        Raises:
            CheckpointError: a field that our models cannot express, or is no proper value.
        """

    @abstractmethod
    def settings(self, model: ModelConfig) -> dict[str, Any]:
        """What config.json says of our model.

        Raises:
            CheckpointError: a field of ours that this architecture cannot express.
        """

    @abstractmethod
    def entries(self, model: ModelConfig, prefix: str | None = None) -> list[Entry]:
        """An entry for every tensor of a language model, in the model's order."""

    @abstractmethod
    def is_ignorable(self, name: str, model: ModelConfig) -> bool:
        """Whether a tensor of theirs may be present without meaning.

        Such are buffers that their constructors make, and what they keep twice.
        """

    def to_write(self, model: ModelConfig, ours: Collection[str]) -> Written:
        """What is written of a model that has the tensors `ours`."""
        return Written(self.class_name, self.entries(model), notes=tuple(self._notes(model)))

    def found(self, hf: Mapping[str, Any], theirs: Collection[str]) -> Found:
        """What the tensors `theirs` beside a config.json are.

        Raises:
            CheckpointError: the model cannot be expressed; tensors are missing or not known.
        """
        refuse_quantised(hf)
        model = self.model_config_of(hf)
        mapped = self.entries(model, self._prefix_of(theirs))
        return self.checked(Found(model, mapped, self.named_class(hf) or self.class_name), theirs)

    def checked(self, found: Found, theirs: Collection[str]) -> Found:
        """`found`, after a look at what is missing or left over."""
        meant = set(theirs) - set(found.renamed.values()) | set(found.renamed)
        absent = missing(found.entries, meant)
        left = unknown(found.entries, meant)
        extra = [name for name in left if not self.is_ignorable(name, found.model)]
        problems = [
            f"{len(names)} tensors of the {self.model_type} are {what}: {_some(names)}"
            for what, names in (("missing", absent), ("not known", extra))
            if names
        ]
        if problems:
            raise CheckpointError(problems)
        return found

    def named_class(self, hf: Mapping[str, Any]) -> str | None:
        """The class that config.json names, where it names one.

        Raises:
            CheckpointError: `architectures` is no list of names, or of none of this architecture.
        """
        names = hf.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(
                f"config.json: architectures is {names!r}, expected a list of names"
            )
        if names and not names[0].startswith(self.stem):
            raise CheckpointError(
                f"config.json: architectures is {names!r}, expected a class of {self.model_type}, "
                f"{self.stem}..."
            )
        return names[0] if names else None

    def _prefix_of(self, theirs: Collection[str]) -> str:
        """The prefix that names have: those of the bare network have none."""
        return self.prefix if any(name.startswith(self.prefix) for name in theirs) else ""

    def _notes(self, model: ModelConfig) -> Iterator[str]:
        """What their settings leave out of ours."""
        yield from ()


def refuse_quantised(hf: Mapping[str, Any]) -> None:
    """Raise CheckpointError where weights are stored as codes."""
    if hf.get("quantization_config") is not None:
        raise CheckpointError("config.json: quantization_config is given, expected plain weights")


def renamed(modules: Mapping[str, str], kinds: Collection[str]) -> Iterator[Entry]:
    """Entries of modules that have other names and nothing else; `kinds` are weight and bias."""
    for ours, theirs in modules.items():
        for kind in kinds:
            yield Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",))


def _some(names: Collection[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (" ..." if len(names) > len(first) else "")
