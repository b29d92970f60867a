"""What every tokenizer offers, over the `tokenizers` library.

The text of a special token that stands in a document ("[MASK]") is ordinary text here: data cannot
smuggle in control tokens. The saved `tokenizer.json` recognises them, as its users expect.
"""

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A vocabulary and the rules to cut text by it.

    type: the value of --tokenizer-type; special: text of each special token by its role, such as
    {"mask": "[MASK]"}; files: the vocabulary files, which an export or a checkpoint carries along;
    starts_word: bool [vocab_size], False for tokens that continue a word; settings: what stock
    `transformers` has to know to load the vocabulary.
    """

    type: str
    backend: tokenizers.Tokenizer
    special: Mapping[str, str]
    starts_word: npt.NDArray[np.bool_]
    files: tuple[Path, ...]
    settings: Mapping[str, Any]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, before any padding."""
        return self.backend.get_vocab_size(with_added_tokens=False)

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
    def eod(self) -> int:
        """Id of the token that ends a document."""
        return self._special("eod")

    @property
    def special_ids(self) -> list[int]:
        """Ids of all special tokens, ascending."""
        return sorted(self._special(role) for role in self.special)

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text; faster than one by one."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Write the vocabulary with `tokenizer.json` and its settings for stock `transformers`."""
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=directory) as aside:
            self._write(Path(aside))
            for file in sorted(Path(aside).iterdir()):
                file.replace(directory / file.name)

    def _write(self, directory: Path) -> None:
        self.backend.model.save(str(directory))
        complete = copy.deepcopy(self.backend)
        complete.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in self.special.values()]
        )
        if "cls" in self.special:
            complete.post_processor = self._bert_template()
        complete.save(str(directory / "tokenizer.json"))
        settings = json.dumps(dict(self.settings), indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")

    def _bert_template(self) -> TemplateProcessing:
        cls, sep = self.special["cls"], self.special["sep"]
        return TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, self.cls), (sep, self.sep)],
        )

    def _special(self, role: str) -> int:
        if role not in self.special:
            raise ConfigError(f"--tokenizer-type {self.type} has no {role} token")
        token = self.backend.token_to_id(self.special[role])
        assert token is not None  # the loaders refuse a vocabulary without it
        return token
