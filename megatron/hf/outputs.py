"""What the models return: tensors by name, and the tuple of those that there are.

The classes, their fields and the order of these are those that `transformers` documents.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, NoReturn

from torch import Tensor
from torch.utils import _pytree

Tensors = tuple[Tensor, ...]


class ModelOutput(OrderedDict[str, Any]):
    """A dictionary of a dataclass' fields that are not None, and their tuple.

    `output.logits`, `output["logits"]`, `output[0]` and `output[:2]` are all understood. A field
    that is None is an attribute and no item. Items can be set and not taken away.
    """

    # Subclasses are dataclasses; this one has no field of its own.
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # So that torch finds the tensors inside, as DistributedDataParallel does.
        _pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if value is not None and name in self.__dataclass_fields__:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __delitem__(self, key: str) -> NoReturn:
        self._keep("__delitem__")

    def setdefault(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self._keep("setdefault")

    def pop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self._keep("pop")

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self._keep("update")

    def _keep(self, method: str) -> NoReturn:
        raise TypeError(f"{type(self).__name__}: an output has no {method}")

    def __reduce__(self) -> tuple[Any, ...]:
        values = tuple(getattr(self, field.name) for field in fields(self))
        return type(self), values

    def __copy__(self) -> ModelOutput:
        cls, values = self.__reduce__()
        copied = cls(*values)
        assert isinstance(copied, ModelOutput)
        return copied

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of all fields that are not None, in order."""
        return tuple(self.values())


@dataclass
class BaseModelOutputWithPoolingAndCrossAttentions(ModelOutput):
    """Of a model without a head.

    Attributes:
        last_hidden_state: [b, s, h]
        pooler_output: [b, h]
        hidden_states: the embedding's output and each layer's, [b, s, h]
        past_key_values: of each layer its keys and values, [b, n, z, d]
        attentions, cross_attentions: of each layer the weights behind the softmax, [b, n, s, z]
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: Tensors | None = None
    past_key_values: tuple[Tensors, ...] | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass
class BaseModelOutputWithPastAndCrossAttentions(ModelOutput):
    """Of a stack of layers; see `BaseModelOutputWithPoolingAndCrossAttentions`."""

    last_hidden_state: Tensor | None = None
    past_key_values: tuple[Tensors, ...] | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass
class _HeadOutput(ModelOutput):
    """Of a head with one kind of logits; the loss [] is there where labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class MaskedLMOutput(_HeadOutput):
    """Logits [b, s, v]."""


@dataclass
class NextSentencePredictorOutput(_HeadOutput):
    """Logits [b, 2]."""


@dataclass
class SequenceClassifierOutput(_HeadOutput):
    """Logits [b, c]."""


@dataclass
class MultipleChoiceModelOutput(_HeadOutput):
    """Logits [b, choices]."""


@dataclass
class TokenClassifierOutput(_HeadOutput):
    """Logits [b, s, c]."""


@dataclass
class CausalLMOutputWithCrossAttentions(ModelOutput):
    """Logits [b, s, v]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: tuple[Tensors, ...] | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """Logits [b, s] of where the answer starts and ends."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class BertForPreTrainingOutput(ModelOutput):
    """Logits of the vocabulary [b, s, v] and of the next sentence [b, 2]."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class MegatronBertForPreTrainingOutput(BertForPreTrainingOutput):
    """See `BertForPreTrainingOutput`."""
