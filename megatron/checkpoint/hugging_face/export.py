"""Write a model as a directory that stock `transformers` loads.

    model.safetensors        weights, or several such files and an index
    config.json              the architecture, with the true vocabulary size, epsilon and activation
    tokenizer files          see `tokenizer`

The weights pass through memory one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron.checkpoint.hugging_face.architecture import Written
from megatron.checkpoint.hugging_face.models import architecture_for, hugging_face_config
from megatron.checkpoint.hugging_face.tokenizer import special_token_ids, write_tokenizer
from megatron.checkpoint.safetensors_writer import TensorPlan, write_safetensors
from megatron.checkpoint.tensor_source import TensorSource
from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from megatron.tokenizer import Tokenizer


def write_hugging_face(
    directory: Path,
    model: ModelConfig,
    source: TensorSource,
    *,
    max_bytes: int,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Write the model and its tokenizer into `directory`, in files of at most `max_bytes`.

    Args:
        source: all tensors of the model, by our names; their class follows from the heads.
        dtype: type to store; by default each tensor's own.
        on_bytes: told how many bytes have been written so far.

    Returns:
        What a reader of the directory should know, a sentence each.

    Raises:
        CheckpointError: tensors are missing or unknown, the model cannot be expressed there, or
            the disk is full.
    """
    written = architecture_for(model).to_write(model, source.shapes)
    plans = list(_plans(written, source, dtype))
    config = hugging_face_config(
        model,
        dtype=plans[0].dtype,
        class_name=written.class_name,
        tokens={} if tokenizer is None else special_token_ids(tokenizer, model),
    )
    tensors = (
        tensor.to(plan.dtype) for plan, tensor in zip(plans, _tensors(written, source), strict=True)
    )
    try:
        write_safetensors(directory, plans, tensors, max_bytes=max_bytes, on_bytes=on_bytes)
    except OSError as error:  # of a full disk, which does not say the file
        raise CheckpointError(f"{directory} cannot be written: {error.strerror}") from error
    text = json.dumps(config | _labels(source), indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    notes = list(written.notes)
    if tokenizer is not None:
        notes += write_tokenizer(directory, tokenizer, model)
    return notes


def _plans(
    written: Written, source: TensorSource, dtype: torch.dtype | None
) -> Iterator[TensorPlan]:
    """What will be written: known before any tensor is read."""
    shapes, dtypes = source.shapes, source.dtypes
    ours = {entry.ours for entry in written.entries}
    missing = sorted(ours - shapes.keys())
    unknown = sorted(shapes.keys() - ours)
    if missing or unknown:
        raise CheckpointError(
            f"these tensors are no {written.class_name} of their configuration: "
            f"{len(missing)} are missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        )
    further = _further_names(written)
    for entry in written.entries:
        kind = dtype or dtypes[entry.ours]
        for name, shape in zip(entry.theirs, entry.shapes(shapes[entry.ours]), strict=True):
            yield TensorPlan(name, shape, kind)
            if name in further:
                yield TensorPlan(further[name], shape, kind)
    for name, shape in written.zeros.items():
        yield TensorPlan(name, shape, dtype or dtypes[written.entries[0].ours])


def _tensors(written: Written, source: TensorSource) -> Iterator[torch.Tensor]:
    """The tensors in the order of their plans, one of ours read at a time."""
    further = _further_names(written)
    for entry in written.entries:
        parts = entry.split(source.read(entry.ours))
        for name, tensor in zip(entry.theirs, parts, strict=True):
            yield tensor
            if name in further:
                yield tensor
    for shape in written.zeros.values():
        yield torch.zeros(shape)


def _further_names(written: Written) -> dict[str, str]:
    """For each tensor that is written twice, its second name."""
    return {name: copy for copy, name in written.copies.items()}


def _labels(source: TensorSource) -> dict[str, dict[str, object]]:
    """How many labels a classifier or the ends of an answer have, as config.json says it."""
    heads = [source.shapes.get(f"{head}.weight") for head in ("classifier", "qa_outputs")]
    counts = [shape[0] for shape in heads if shape is not None]
    if not counts:
        return {}
    names = [f"LABEL_{number}" for number in range(counts[0])]
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
