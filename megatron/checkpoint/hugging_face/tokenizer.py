"""Vocabulary files on their way to and from a directory of Hugging Face's.

Which files there are says which kind of tokenizer they make; `tokenizer_config.json` says what the
files leave open, such as whether text is lower-cased. The other way, WordPiece and byte-level
tokenizers bring a tokenizer.json, which both sides read alike. A SentencePiece model goes as it
is, under the name that its class looks for.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from megatron.tokenizer import SentencePieceTokenizer, Tokenizer
from megatron.tokenizer.tokenizer import sentinel_text

CONFIG_FILE = "tokenizer_config.json"
_SENTENCE_PIECE = "SentencePieceTokenizer"
# For each set of files the flags that name them; the first set that is there counts.
_FILES = (
    {"vocab_file": "vocab.txt"},
    {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
    {"tokenizer_model": "tokenizer.model"},
    {"tokenizer_model": "spiece.model"},
)
_ROLES = ("pad", "bos", "eos", "unk")


@dataclass(frozen=True)
class FoundTokenizer:
    """The tokenizer of a directory of theirs.

    type: value of --tokenizer-type, None where no files of a kind that we know are there; files:
    the files by the fields of the flags that name them; notes: what does not carry over.
    """

    type: str | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_tokenizer(directory: Path) -> FoundTokenizer:
    """The tokenizer whose files lie in `directory`.

    Raises:
        CheckpointError: its tokenizer_config.json is damaged.
    """
    settings = _settings(directory / CONFIG_FILE)
    for names in _FILES:
        files = {flag: directory / name for flag, name in names.items()}
        if all(file.is_file() for file in files.values()):
            return FoundTokenizer(_type(files, settings), files, _notes(files))
    notes = []
    if (directory / "tokenizer.json").is_file():
        known = " or ".join(" and ".join(names.values()) for names in _FILES)
        notes.append(f"tokenizer.json alone says no kind of tokenizer of ours; expected {known}")
    return FoundTokenizer(notes=tuple(notes))


def _type(files: Mapping[str, Path], settings: Mapping[str, Any]) -> str:
    if "tokenizer_model" in files:
        return _SENTENCE_PIECE
    if "merge_file" in files:
        return "GPT2BPETokenizer"
    lower_case = settings.get("do_lower_case", True)
    return "BertWordPieceLowerCase" if lower_case else "BertWordPieceCase"


def _notes(files: Mapping[str, Path]) -> tuple[str, ...]:
    model = files.get("tokenizer_model")
    if model is None or model.name != "spiece.model":
        return ()
    return (
        "the sentinels of T5's tokenizer count downwards from the last id, those of "
        "--vocab-extra-ids upwards from the first behind the vocabulary",
    )


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is damaged: expected an object")
    return settings


def special_token_ids(tokenizer: Tokenizer, model: ModelConfig) -> dict[str, int]:
    """What config.json says of a tokenizer, such as {"pad_token_id": 0}."""
    wanted = {"bert": ("pad",), "gpt": ("bos", "eos"), "t5": ("pad", "eos")}[model.model_type]
    found = {
        f"{role}_token_id": getattr(tokenizer, role) for role in wanted if role in tokenizer.special
    }
    if model.model_type == "t5" and "bos" in tokenizer.special:
        found["decoder_start_token_id"] = tokenizer.bos
    return found


def write_tokenizer(directory: Path, tokenizer: Tokenizer, model: ModelConfig) -> list[str]:
    """Write a tokenizer so that stock `transformers` loads it; returns what it should know."""
    longest = {"model_max_length": model.max_position_embeddings}
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _write_sentence_piece(directory, tokenizer, longest)
    settings = {**tokenizer.settings, **longest}
    dataclasses.replace(tokenizer, settings=settings).save(directory)
    return []


def _write_sentence_piece(
    directory: Path, tokenizer: SentencePieceTokenizer, longest: dict[str, int]
) -> list[str]:
    """The model and the class of theirs that has its kind of rules."""
    if _merges_pairs(tokenizer):
        name, kind = "tokenizer.model", "LlamaTokenizer"
        own: dict[str, object] = {"add_bos_token": False}
        note = "the fast LlamaTokenizer keeps runs of spaces, which SentencePiece may take for one"
    else:
        # Theirs would add sentinels that count downwards; ours are given by their ids below.
        name, kind, own = "spiece.model", "T5Tokenizer", {"extra_ids": 0}
        note = "T5Tokenizer ends each text with </s>, unless add_special_tokens is false"
    shutil.copyfile(tokenizer.files[0], directory / name)
    names = {
        f"{role}_token": tokenizer.special[role] for role in _ROLES if role in tokenizer.special
    }
    # legacy: a text begins with a space, and nothing else is changed, as SentencePiece itself does.
    settings = {"tokenizer_class": kind, "legacy": True, **own, **names, **longest}
    settings |= _sentinels(tokenizer)
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    return [note]


def _merges_pairs(tokenizer: SentencePieceTokenizer) -> bool:
    """Whether the model is of byte pairs, whose scores are ranks, and not of probabilities."""
    backend = tokenizer.backend
    pieces = range(backend.get_piece_size())
    return all(backend.get_score(piece).is_integer() for piece in pieces)


def _sentinels(tokenizer: Tokenizer) -> dict[str, Any]:
    """The sentinels at the ids that they have here."""
    if not tokenizer.sentinels:
        return {}
    texts = {token: sentinel_text(number) for number, token in enumerate(tokenizer.sentinels)}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {
        "additional_special_tokens": list(texts.values()),
        "added_tokens_decoder": {
            str(token): {"content": text, **flags, "special": True} for token, text in texts.items()
        },
    }
