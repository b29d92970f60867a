"""A tokenizer over the `tokenizers` library.

The saved `tokenizer.json` recognises special tokens in a text, as its users expect.
"""

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from megatron.tokenizer.tokenizer import Tokenizer, sentinel_text


@dataclass(frozen=True, kw_only=True)
class FastTokenizer(Tokenizer):
    """`Tokenizer` whose rules are a model, without added tokens, of the `tokenizers` library."""

    backend: tokenizers.Tokenizer

    def token_id(self, text: str) -> int | None:
        """See `Tokenizer`."""
        return self.backend.token_to_id(text)

    def tokenize(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def detokenize(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return self._complete.decode(list(ids), skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Write the vocabulary with `tokenizer.json` and its settings for stock `transformers`."""
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=directory) as aside:
            self._write(Path(aside))
            for file in sorted(Path(aside).iterdir()):
                file.replace(directory / file.name)

    def _write(self, directory: Path) -> None:
        self.backend.model.save(str(directory))
        self._complete.save(str(directory / "tokenizer.json"))
        settings = json.dumps(dict(self.settings), indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")

    @cached_property
    def _complete(self) -> tokenizers.Tokenizer:
        """The backend with special tokens and sentinels, which it would find in texts as well."""
        complete = copy.deepcopy(self.backend)
        sentinels = map(sentinel_text, range(len(self.sentinels)))
        added = dict.fromkeys([*self.special.values(), *sentinels])
        complete.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in added]
        )
        if "cls" in self.special:
            complete.post_processor = self._bert_template()
        return complete

    def _bert_template(self) -> TemplateProcessing:
        cls, sep = self.special["cls"], self.special["sep"]
        return TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, self.cls), (sep, self.sep)],
        )
