"""GPT-2's byte-level byte-pair encoding: any text, no unknown token."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megatron.errors import DataError
from megatron.tokenizer.fast import FastTokenizer
from megatron.tokenizer.vocabulary import read_text, require_special

SPECIAL = {"eod": "<|endoftext|>"}
# GPT-2 has but this one, which also opens, ends and fills up where a model needs such a token.
ROLES = ("eod", "bos", "eos", "pad")
SPACE = "Ġ"  # the letter that stands for the byte of a space


def load_byte_level(vocab_file: Path, merge_file: Path) -> FastTokenizer:
    """The tokenizer of a `vocab.json` (ids by token) and a `merges.txt` (pairs in merging order).

    Raises DataError where a file is missing or damaged, or the two do not belong together.
    """
    ids = _read_ids(vocab_file)
    require_special(vocab_file, ids, SPECIAL.values())
    merges = _read_merges(merge_file, ids, vocab_file)
    tokens = sorted(ids, key=ids.__getitem__)
    special = set(SPECIAL.values())
    name = SPECIAL["eod"]
    return FastTokenizer(
        type="GPT2BPETokenizer",
        backend=byte_level_backend(ids, merges),
        special=dict.fromkeys(ROLES, name),
        starts_word=np.array([token.startswith(SPACE) or token in special for token in tokens]),
        files=(vocab_file, merge_file),
        settings={
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": name,
            "eos_token": name,
            "unk_token": name,
        },
    )


def byte_level_backend(ids: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """GPT-2's rules over a vocabulary: words with the space before them, as bytes, merged."""
    backend = tokenizers.Tokenizer(models.BPE(ids, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_ids(path: Path) -> dict[str, int]:
    try:
        ids = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: invalid JSON on line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    if not isinstance(ids, dict) or not all(type(i) is int for i in ids.values()):
        raise DataError(f"{path}: expected a JSON object of token ids by token")
    wrong = next((i for i, known in enumerate(sorted(ids.values())) if i != known), None)
    if wrong is not None:
        raise DataError(f"{path}: id {wrong} of {len(ids)} is missing or an id is given twice")
    return ids


def _read_merges(path: Path, ids: dict[str, int], vocab_file: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise DataError(f"{path}: line {number} is {line!r}, expected two tokens")
        unknown = next((token for token in (left, right, left + right) if token not in ids), None)
        if unknown is not None:
            raise DataError(f"{path}: line {number} makes {unknown!r}, which {vocab_file} lacks")
        merges.append((left, right))
    return merges
