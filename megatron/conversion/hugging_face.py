"""Directories of Hugging Face's format: config.json, weights, and a tokenizer.

What names and configurations mean is known to `megatron.checkpoint.hugging_face`; here are the
files around them.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.checkpoint.hugging_face.export import write_hugging_face
from megatron.checkpoint.hugging_face.files import HuggingFaceFiles
from megatron.checkpoint.hugging_face.models import architecture_for, open_hugging_face
from megatron.checkpoint.hugging_face.tokenizer import find_tokenizer
from megatron.conversion.network import expect_shapes
from megatron.conversion.stored_model import StoredModel, TokenizerFiles, of_dtypes
from megatron.errors import CheckpointError
from megatron.tokenizer import Tokenizer, load_tokenizer

# Files of a directory that concern its tokenizer, whatever its kind.
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# From this version on `transformers` computes models with relative positions as if they had none.
_DROPS_DISTANCES_FROM = 5


def read_hugging_face(directory: Path) -> StoredModel:
    """The model in a directory of Hugging Face's format; no tensor is read yet.

    Raises:
        CheckpointError: a file is missing or damaged, or the model cannot be expressed here.
    """
    settings = _read_json(directory / "config.json")
    files = HuggingFaceFiles(directory)
    try:
        opened = open_hugging_face(settings, files)
        expect_shapes(opened.model, opened.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {problem}" for problem in error.problems) from error
    tokenizer = find_tokenizer(directory)
    return StoredModel(
        "hf",
        directory,
        of_dtypes(opened.model, opened.tensors.dtypes.values()),
        opened.tensors,
        tokenizer=TokenizerFiles(type=tokenizer.type, **tokenizer.files, others=_others(directory)),
        facts={"architecture": opened.class_name},
        notes=(*opened.notes, *tokenizer.notes),
    )


def write_hugging_face_model(
    directory: Path,
    stored: StoredModel,
    *,
    max_bytes: int,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> StoredModel:
    """Write the model and its tokenizer into `directory` and open what was written.

    max_bytes: size of the largest weight file; on_bytes: told how many bytes have been written.

    Raises:
        CheckpointError: Hugging Face's format cannot express the model, or it is damaged.
    """
    # Fields that cannot be expressed are a clearer answer than the tensors that follow from them.
    architecture_for(stored.model).settings(stored.model)
    tokenizer = None if stored.tokenizer.others else _load(stored)
    notes = write_hugging_face(
        directory,
        stored.model,
        stored.source,
        max_bytes=max_bytes,
        tokenizer=tokenizer,
        on_bytes=on_bytes,
    )
    for file in stored.tokenizer.others:
        shutil.copyfile(file, directory / file.name)
    if tokenizer is None and not stored.tokenizer.others:
        notes.append("no tokenizer came with the model: written without one")
    written = read_hugging_face(directory)
    return dataclasses.replace(written, notes=(*notes, *written.notes))


def runs_stock(stored: StoredModel) -> bool:
    """Whether a model is one that stock `transformers` computes as it was meant."""
    if stored.format != "hf":
        return False
    major = int(importlib.metadata.version("transformers").split(".")[0])
    return not stored.model.has_distances or major < _DROPS_DISTANCES_FROM


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent}: there is no such directory")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; it says what model the directory holds")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: expected an object")
    return found


def _others(directory: Path) -> tuple[Path, ...]:
    """The files of a directory that concern its tokenizer."""
    return tuple(f for name in _TOKENIZER_FILES if (f := directory / name).is_file())


def _load(stored: StoredModel) -> Tokenizer | None:
    """The tokenizer that came with a model, with the sentinels that its run had."""
    files = stored.tokenizer
    if files.type is None or not files.named:
        return None
    named = {flag: str(file) for flag, file in files.named.items()}
    tokenizer = load_tokenizer(
        files.type,
        named.get("vocab_file"),
        named.get("merge_file"),
        named.get("tokenizer_model"),
    )
    extra = 0 if stored.config is None else stored.config.data.vocab_extra_ids
    return tokenizer.with_sentinels(extra) if extra else tokenizer
