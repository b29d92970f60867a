"""What every tokenizer offers: text to ids and back, and the ids with a role of their own.

The text of a special token that stands in a document ("[MASK]") is ordinary text here: data cannot
smuggle in control tokens.

Sentinels are tokens behind the vocabulary that no text becomes: T5 marks masked spans with them.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron.errors import ConfigError, DataError


def sentinel_text(number: int) -> str:
    """How sentinel `number`, from 0 on, is written."""
    return f"<extra_id_{number}>"


@dataclass(frozen=True, kw_only=True)
class Tokenizer(ABC):
    """A vocabulary and the rules to cut text by it.

    type: the value of --tokenizer-type; special: text of the special token of each role, such as
    {"mask": "[MASK]"}, where one token may have several roles; files: the vocabulary files, which
    an export or a checkpoint carries along; starts_word: bool [vocab_size], False for tokens that
    continue a word; settings: what stock `transformers` has to know to load the vocabulary;
    sentinels: their ids, ascending.
    """

    type: str
    special: Mapping[str, str]
    starts_word: npt.NDArray[np.bool_]
    files: tuple[Path, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    sentinels: tuple[int, ...] = ()

    @abstractmethod
    def token_id(self, text: str) -> int | None:
        """The id of a token of the vocabulary by its text; None where it has no such token."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""

    @abstractmethod
    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text; faster than one by one."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens and sentinels included."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the vocabulary as the programs read it that know its kind."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, sentinels included, before any padding."""
        return len(self.starts_word)

    @property
    def cls(self) -> int:
        """Id of the token that opens a sample."""
        return self._special("cls")

    @property
    def sep(self) -> int:
        """Id of the token that ends a segment."""
        return self._special("sep")

    @property
    def mask(self) -> int:
        """Id of the token that hides another."""
        return self._special("mask")

    @property
    def pad(self) -> int:
        """Id of the token that fills up a sequence."""
        return self._special("pad")

    @property
    def bos(self) -> int:
        """Id of the token that a decoder starts from."""
        return self._special("bos")

    @property
    def eos(self) -> int:
        """Id of the token that ends what a decoder writes."""
        return self._special("eos")

    @property
    def eod(self) -> int | None:
        """Id of the token that ends a document; None where the vocabulary has none."""
        return self._special("eod") if "eod" in self.special else None

    @property
    def special_ids(self) -> list[int]:
        """Ids of all special tokens and sentinels, ascending."""
        return sorted({*map(self._special, self.special), *self.sentinels})

    def with_sentinels(self, count: int) -> Self:
        """This tokenizer with so many sentinels, their ids those behind the vocabulary's.

        Raises DataError where the vocabulary holds the text of one.
        """
        known = [t for t in map(sentinel_text, range(count)) if self.token_id(t) is not None]
        if known:
            raise DataError(
                f"{self.files[0]}: holds {known[0]}, which --vocab-extra-ids {count} would add"
            )
        first = self.vocab_size
        return dataclasses.replace(
            self,
            sentinels=tuple(range(first, first + count)),
            starts_word=np.append(self.starts_word, np.ones(count, np.bool_)),
        )

    def _special(self, role: str) -> int:
        if role not in self.special:
            raise ConfigError(f"--tokenizer-type {self.type} has no {role} token")
        token = self.token_id(self.special[role])
        assert token is not None  # the loaders refuse a vocabulary without it
        return token
