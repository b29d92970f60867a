"""Megatron-LM's checkpoints, split over ranks as the flags say.

What their names, arguments and rows mean is known to `megatron.checkpoint.megatron_lm`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.megatron_lm import MegatronCheckpoint, open_megatron, write_megatron
from megatron.conversion.stored_model import StoredModel, TokenizerFiles
from megatron.errors import CheckpointError

# Which flags name the files of each kind of tokenizer, in the order in which args name them.
_FILES = {
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "SentencePieceTokenizer": ("tokenizer_model",),
}
# What the writer calls the flags of a run, and what they are called where a split is a target.
_TARGET_FLAGS = {
    "--tensor-model-parallel-size": "--target-tensor-parallel-size",
    "--pipeline-model-parallel-size": "--target-pipeline-parallel-size",
    "--pipeline-model-parallel-split-rank": "--target-split-rank",
}


@dataclass(frozen=True)
class Split:
    """How a checkpoint is spread over ranks.

    decoder_from: the pipeline stage at which an encoder-decoder's decoder begins.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    decoder_from: int | None = None


def read_megatron(
    path: Path, *, heads: int | None = None, vocab_size: int | None = None
) -> StoredModel:
    """The model of a Megatron-LM checkpoint; no large tensor is read yet.

    heads, vocab_size: what the checkpoint may not say.

    Raises:
        CheckpointError: files are missing, damaged, or hold anything but tensors and plain values.
    """
    opened = open_megatron(path, heads=heads, vocab_size=vocab_size)
    facts = {
        "version": opened.version,
        "split": {
            "tensor": opened.tensor,
            "pipeline": opened.pipeline,
            "virtual": opened.virtual,
        },
    }
    absent = [f"the source has no {name}" for name in opened.missing_heads]
    return StoredModel(
        "megatron",
        path,
        opened.model,
        opened,
        iteration=opened.iteration,
        tokenizer=_tokenizer_of(opened),
        facts=facts,
        notes=(*opened.notes, *absent),
    )


def write_megatron_model(
    directory: Path,
    stored: StoredModel,
    split: Split,
    *,
    version: int = 3,
    iteration: int | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> StoredModel:
    """Write the model as the latest checkpoint in `directory` and open what was written.

    iteration: None for a release; on_bytes: told how many bytes have been written.

    Raises:
        CheckpointError: Megatron-LM cannot express the model or the split.
    """
    try:
        notes = write_megatron(
            directory,
            stored.model,
            stored.source,
            tensor=split.tensor,
            pipeline=split.pipeline,
            virtual=split.virtual,
            split_rank=split.decoder_from,
            version=version,
            iteration=iteration,
            tokenizer_type=stored.tokenizer.type,
            on_bytes=on_bytes,
        )
    except CheckpointError as error:
        raise CheckpointError(map(_in_target_flags, error.problems)) from error
    files = stored.tokenizer.named.values()
    for file in files:
        (directory / "tokenizer").mkdir(exist_ok=True)
        shutil.copyfile(file, directory / "tokenizer" / file.name)
    written = read_megatron(directory)
    return dataclasses.replace(written, notes=(*notes, *written.notes))


def _in_target_flags(problem: str) -> str:
    for theirs, ours in _TARGET_FLAGS.items():
        problem = problem.replace(theirs, ours)
    return problem


def _tokenizer_of(opened: MegatronCheckpoint) -> TokenizerFiles:
    """The tokenizer that a checkpoint's arguments name, where its files are on this disk."""
    fields = _FILES.get(opened.tokenizer_type or "", ())
    if not fields or len(fields) != len(opened.tokenizer_files):
        return TokenizerFiles()
    files: dict[str, Any] = dict(zip(fields, opened.tokenizer_files, strict=True))
    return TokenizerFiles(type=opened.tokenizer_type, **files)
