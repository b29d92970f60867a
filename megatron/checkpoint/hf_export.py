"""Write a checkpoint of BERT as a directory that stock `transformers` loads.

    model.safetensors        weights, or several such files and an index
    config.json              the architecture, with the true vocabulary size, epsilon and activation
    vocab.txt, tokenizer.json, tokenizer_config.json

The weights pass through memory one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron.checkpoint.hf_megatron_bert import entries, hugging_face_config, to_hugging_face
from megatron.checkpoint.reader import Checkpoint
from megatron.checkpoint.safetensors_writer import TensorPlan, write_safetensors
from megatron.errors import CheckpointError
from megatron.tokenizer import Tokenizer, load_tokenizer

# What MegatronBert takes where nothing is known of a tokenizer.
_USUAL_PAD_TOKEN = 0


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
    tokenizer = _tokenizer(checkpoint)
    pad = _USUAL_PAD_TOKEN if tokenizer is None else tokenizer.pad
    config = hugging_face_config(model, pad_token_id=pad, dtype=plans[0].dtype)
    tensors = to_hugging_face(model, checkpoint.stored.read)
    write_safetensors(directory, plans, _counted(tensors, on_bytes), max_bytes=max_bytes)
    text = json.dumps(config, indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(directory)


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


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer whose vocabulary came with the checkpoint, if one did."""
    data = checkpoint.config.data
    carried = {file.name: str(file) for file in checkpoint.tokenizer_files}
    if data.vocab_file is None or Path(data.vocab_file).name not in carried:
        return None
    vocab_file = carried[Path(data.vocab_file).name]
    merge_file = data.merge_file and carried.get(Path(data.merge_file).name)
    tokenizer = load_tokenizer(data.tokenizer_type, vocab_file, merge_file)
    longest = {"model_max_length": checkpoint.config.model.max_position_embeddings}
    return dataclasses.replace(tokenizer, settings={**tokenizer.settings, **longest})
