"""SentencePiece models (Kudo and Richardson, 2018): the vocabularies of T5, Llama and many others.

The model is one file, read by the package `sentencepiece`, which is imported when a model is.
Which control tokens a model has was decided when it was trained. Where it has no beginning of a
text, as those of T5, a decoder starts from the padding token, as theirs does.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron.errors import ConfigError, DataError
from megatron.tokenizer.tokenizer import Tokenizer, sentinel_text

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

TYPE = "SentencePieceTokenizer"
SPACE = "\u2581"  # stands for a space at the front of a piece


@dataclass(frozen=True, kw_only=True)
class SentencePieceTokenizer(Tokenizer):
    """`Tokenizer` over a SentencePiece model."""

    backend: "SentencePieceProcessor"

    def token_id(self, text: str) -> int | None:
        """See `Tokenizer`."""
        token = self.backend.piece_to_id(text)
        return token if self.backend.id_to_piece(token) == text else None

    def tokenize(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self.backend.encode(text)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        return self.backend.encode(list(texts), num_threads=1)

    def detokenize(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if self._is_text(token):
                run.append(token)
            else:
                parts += [self.backend.decode(run), self._name(token)]
                run = []
        return " ".join(part for part in [*parts, self.backend.decode(run)] if part)

    def save(self, directory: Path) -> None:
        """Write the model as tokenizer.model."""
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / ".tokenizer.model.part"
        shutil.copyfile(self.files[0], part)
        part.replace(directory / "tokenizer.model")

    def _is_text(self, token: int) -> bool:
        return token < self.backend.get_piece_size() and not self.backend.is_control(token)

    def _name(self, token: int) -> str:
        words = self.backend.get_piece_size()
        return sentinel_text(token - words) if token >= words else self.backend.id_to_piece(token)


def load_sentence_piece(model_file: Path) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model.

    Raises ConfigError where the package is missing, DataError where the file is missing or damaged.
    """
    backend = _read_model(model_file)
    pieces = [backend.id_to_piece(i) for i in range(backend.get_piece_size())]
    return SentencePieceTokenizer(
        type=TYPE,
        backend=backend,
        special={role: pieces[token] for role, token in _roles(backend).items()},
        starts_word=np.array(
            [piece.startswith(SPACE) or backend.is_control(i) for i, piece in enumerate(pieces)]
        ),
        files=(model_file,),
    )


def _read_model(path: Path) -> "SentencePieceProcessor":
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ConfigError(
            f"--tokenizer-type {TYPE} needs the package sentencepiece: pip install sentencepiece"
        ) from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer model: {error.strerror}") from error
    backend = SentencePieceProcessor()
    try:
        backend.load_from_serialized_proto(content)
    except RuntimeError as error:
        raise DataError(f"{path}: damaged, or no SentencePiece model ({error})") from error
    return backend


def _roles(backend: "SentencePieceProcessor") -> dict[str, int]:
    """Ids of the special tokens; a model that lacks one has another in its place, or none."""

    def first(*candidates: int) -> int:
        return next((token for token in candidates if token >= 0), -1)  # -1: the model has none

    unk, eos, pad = backend.unk_id(), backend.eos_id(), backend.pad_id()
    roles = {
        "unk": unk,
        "pad": first(pad, eos, unk),
        "bos": first(backend.bos_id(), pad, eos),
        "eos": eos,
        "eod": eos,
    }
    return {role: token for role, token in roles.items() if token >= 0}
