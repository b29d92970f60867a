"""Write a checkpoint of BERT as a directory that stock `transformers` loads.

    model.safetensors        weights, or several such files and an index
    config.json              the architecture, with the true vocabulary size, epsilon and activation
    vocab.txt, tokenizer.json, tokenizer_config.json

The weights pass through memory one tensor at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import BertWordPieceTokenizer

from megatron.checkpoint.hf_megatron_bert import entries, hugging_face_config, to_hugging_face
from megatron.checkpoint.reader import Checkpoint
from megatron.checkpoint.safetensors_writer import TensorPlan, write_safetensors
from megatron.errors import CheckpointError

_SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_WORD_PIECE = {"BertWordPieceLowerCase": True, "BertWordPieceCase": False}


def export_bert(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    max_bytes: int,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the model and its tokenizer into `directory`, in files of at most `max_bytes`.

    on_bytes: told how many bytes have been written so far.

    Raises:
        CheckpointError: the checkpoint is damaged, is no BERT, or cannot be expressed there.
    """
    model = checkpoint.config.model
    plans = _plans(checkpoint)
    vocabulary = _vocabulary(checkpoint)
    config = hugging_face_config(
        model, pad_token_id=_pad_token_id(vocabulary), dtype=plans[0].dtype
    )
    tensors = to_hugging_face(model, checkpoint.stored.read)
    write_safetensors(directory, plans, _counted(tensors, on_bytes), max_bytes=max_bytes)
    _write_json(directory / "config.json", config)
    if vocabulary is not None:
        _write_tokenizer(checkpoint, vocabulary, directory)


def _plans(checkpoint: Checkpoint) -> list[TensorPlan]:
    """What will be written: known before any tensor is read."""
    shapes, dtypes = checkpoint.weights, checkpoint.stored.dtypes
    ours = {entry.ours: entry for entry in entries(checkpoint.config.model)}
    missing = [key for key in ours if key not in shapes]
    unknown = [key for key in shapes if key not in ours]
    if missing or unknown:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} is no BERT of its configuration: "
            f"{len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}"
        )
    return [
        TensorPlan(name, shape, dtypes[key])
        for key, entry in ours.items()
        for name, shape in zip(entry.theirs, entry.shapes(shapes[key]), strict=True)
    ]


def _counted(
    tensors: Iterator[tuple[str, torch.Tensor]], on_bytes: Callable[[int], None]
) -> Iterator[torch.Tensor]:
    count = 0
    for _, tensor in tensors:
        yield tensor
        count += tensor.nbytes
        on_bytes(count)


def _vocabulary(checkpoint: Checkpoint) -> Path | None:
    """The WordPiece vocabulary that came with the checkpoint, if one did."""
    data = checkpoint.config.data
    if data.vocab_file is None or data.tokenizer_type not in _WORD_PIECE:
        return None
    name = Path(data.vocab_file).name
    return next((file for file in checkpoint.tokenizer_files if file.name == name), None)


def _pad_token_id(vocabulary: Path | None) -> int:
    if vocabulary is None:
        return 0
    tokens = vocabulary.read_text(encoding="utf-8").split("\n")
    pad = _SPECIAL_TOKENS["pad_token"]
    if pad not in tokens:
        raise CheckpointError(f"{vocabulary} has no {pad}")
    return tokens.index(pad)


def _write_tokenizer(checkpoint: Checkpoint, vocabulary: Path, directory: Path) -> None:
    lower_case = _WORD_PIECE[checkpoint.config.data.tokenizer_type or ""]
    shutil.copyfile(vocabulary, directory / "vocab.txt")
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=lower_case)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lower_case,
        "model_max_length": checkpoint.config.model.max_position_embeddings,
        **_SPECIAL_TOKENS,
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
