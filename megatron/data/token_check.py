"""Finds tokens that no embedding has a row for before a run trips over them.

The smallest and the largest token of a dataset are looked up once and kept beside the index files,
so that only the first run reads the whole .bin.
"""

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron.data.files import built_once
from megatron.data.indexed_dataset import CHUNK_BYTES, IndexedDataset, bin_path, pieces
from megatron.data.progress import Progress
from megatron.errors import DataError


def check_tokens(dataset: IndexedDataset, vocab_size: int, cache_dir: Path) -> None:
    """Raise DataError naming file, position and id of the first token outside the vocabulary."""
    path = bin_path(dataset.prefix)
    check_format(dataset)
    # The tokens may change under the same .idx, as they do when the tokenizer is trained anew.
    state = f"{dataset.fingerprint} {path.stat().st_size} {path.stat().st_mtime_ns}"
    name = hashlib.sha256(state.encode()).hexdigest()[:16]
    cached = cache_dir / f"{path.stem}_tokens_{name}.json"
    built_once(cached, lambda file: _write_range(dataset, file))
    try:
        least, most = json.loads(cached.read_bytes())
    except (ValueError, TypeError) as error:
        raise DataError(f"{cached}: damaged, delete it to have it made anew") from error
    if least < 0 or most >= vocab_size:
        look_at_tokens(dataset, vocab_size)
        raise AssertionError("the cached range of tokens is not that of the dataset")


def check_format(dataset: IndexedDataset) -> None:
    """Raise DataError where tokens are no whole numbers."""
    if dataset.dtype.kind not in "iu":
        path = bin_path(dataset.prefix)
        raise DataError(f"{path}: tokens are {dataset.dtype}, expected whole numbers")


def look_at_tokens(dataset: IndexedDataset, vocab_size: int, most: int | None = None) -> None:
    """As `check_tokens`, of all tokens or of about `most` here and there; writes nothing."""
    tokens = dataset.tokens
    for piece in pieces(len(tokens), most):
        chunk = tokens[piece.start : piece.stop]
        outside = np.flatnonzero((chunk < 0) | (chunk >= vocab_size))
        if len(outside):
            position = piece.start + int(outside[0])
            raise DataError(
                f"{bin_path(dataset.prefix)}: token {position} (byte "
                f"{position * dataset.dtype.itemsize}) is {tokens[position]}, "
                f"outside the vocabulary of {vocab_size} tokens"
            )


def _write_range(dataset: IndexedDataset, file: BinaryIO) -> None:
    tokens = dataset.tokens
    least, most = 0, 0
    progress = Progress(f"checking {bin_path(dataset.prefix)}", "tokens", total=len(tokens))
    for start in range(0, len(tokens), CHUNK_BYTES):
        chunk = tokens[start : start + CHUNK_BYTES]
        least = min(least, int(chunk.min()))
        most = max(most, int(chunk.max()))
        progress.advance(start + len(chunk))
    progress.close()
    file.write(json.dumps([least, most]).encode())
