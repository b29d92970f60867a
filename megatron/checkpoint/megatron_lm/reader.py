"""A Megatron-LM checkpoint read as the global tensors of our model.

1. Find the files of all ranks and read what they hold, without their tensors.
2. Give every tensor its current name, and each stage's layers their global numbers.
3. Make our configuration of the saved arguments and of the tensors' shapes.
4. Hold the tensors against those that such a model has.

A tensor is then joined when it is asked for: each tensor rank's rows are put in our order and go
where they belong, vocabulary padding is left out, and what all ranks hold is rank 0's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from megatron.checkpoint.archive import LazyTensor
from megatron.checkpoint.megatron_lm import rows
from megatron.checkpoint.megatron_lm.arguments import (
    Stored,
    given_arguments,
    model_config,
    tokenizer_files,
)
from megatron.checkpoint.megatron_lm.layout import RankFiles, find_rank_files, open_rank_file
from megatron.checkpoint.megatron_lm.names import (
    LM_HEAD_BIAS,
    WORD_EMBEDDINGS,
    Shape,
    canonical,
    global_name,
    has_no_head_bias,
    is_of_model,
    joined_shape,
    layers_of,
    missing_heads,
    model_specs,
    split_dim,
    without_padding,
)
from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from megatron.mpu.shard_spec import ShardSpec
from megatron.mpu.stage import Stage, encoder_decoder_stages, stages

# A tensor that every rank holds is compared between them up to this size, in elements.
_COMPARED = 1 << 16

_Parts = dict[str, tuple[LazyTensor, ...]]  # of each tensor, those of its tensor ranks


@dataclass(frozen=True)
class MegatronCheckpoint:
    """A Megatron-LM checkpoint as a `TensorSource` of our global tensors; to be closed.

    Attributes:
        model: our configuration, whose `model_type` is what the tensors are of.
        iteration: None for a release.
        version: of the order of rows, 0 to 3.
        tensor, pipeline, virtual: ranks that it was written by, and virtual stages of each.
        missing_heads: what of "language_model.pooler", "lm_head" and "binary_head" it lacks.
        tokenizer_type: as Megatron-LM calls it; None where the checkpoint does not say.
        tokenizer_files: those that it names and that are on this disk.
        notes: a line for each thing that was assumed, or left out.
    """

    model: ModelConfig
    iteration: int | None
    version: int
    tensor: int
    pipeline: int
    virtual: int
    missing_heads: tuple[str, ...]
    tokenizer_type: str | None
    tokenizer_files: tuple[Path, ...]
    notes: tuple[str, ...]
    _specs: Mapping[str, ShardSpec]
    _parts: _Parts
    _archives: ExitStack

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The global shape of every tensor, without vocabulary padding."""
        return {name: self._specs[name].shape for name in self._parts}

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The type of every tensor."""
        return {name: parts[0].dtype for name, parts in self._parts.items()}

    def read(self, name: str) -> torch.Tensor:
        """One global tensor, in this process' memory.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: its data is damaged.
        """
        parts, spec = self._parts[name], self._specs[name]
        if spec.dim is None:
            return parts[0].read()
        whole: torch.Tensor | None = None
        for rank, part in enumerate(parts):
            local = self._in_our_order(name, part.read())
            if local.shape == spec.shape:
                return local
            if whole is None:
                whole = local.new_empty(spec.shape)
            for box in spec.rectangles(rank, len(parts)):
                whole[box.global_slices] = local[box.local_slices]
            del local  # before the next one is read
        assert whole is not None
        return whole

    def _in_our_order(self, name: str, local: torch.Tensor) -> torch.Tensor:
        count = rows.parts_of(name)
        if count is None:
            return local
        return rows.to_ours(local, count, self.model.head_size, self.version)

    def close(self) -> None:
        """Close the files; no tensor can be read any more."""
        self._archives.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_megatron(
    path: Path,
    *,
    vocab_size: int | None = None,
    heads: int | None = None,
    version: int | None = None,
) -> MegatronCheckpoint:
    """Open a Megatron-LM checkpoint; no large tensor is read yet.

    Args:
        path: a run's directory (its latest checkpoint is opened), a checkpoint's directory, a zip
            archive of either, or the file of the only rank.
        vocab_size: tokens before padding; the saved argument where not given, else all rows.
        heads: attention heads, for a checkpoint without arguments.
        version: of the order of rows; the saved one where not given, else 0.

    Raises:
        CheckpointError: files are missing, damaged or hold anything but tensors and plain values;
            or it is no checkpoint of a BERT, GPT or T5 that we know.
    """
    files = find_rank_files(path)
    with ExitStack() as stack:
        ranks = [
            [_Rank(str(file), stack.enter_context(open_rank_file(file)).tree) for file in row]
            for row in files.grid
        ]
        opening = _Opening(files, ranks)
        checkpoint = opening.checkpoint(stack, vocab_size, heads, version)
        return replace(checkpoint, _archives=stack.pop_all())


class _Rank:
    """What the file `name` of one rank holds."""

    def __init__(self, name: str, tree: Any) -> None:
        if not isinstance(tree, Mapping):
            raise CheckpointError(f"{name} is no checkpoint: it holds a {type(tree).__name__}")
        self.tree = tree
        models = [key for key in map(str, tree) if re.fullmatch(r"model\d*", key)]
        if models != ["model"]:
            models.sort(key=lambda key: int(key[5:] or -1))
        if not models or models not in (["model"], [f"model{n}" for n in range(len(models))]):
            found = ", ".join(str(key) for key in list(tree)[:5])
            raise CheckpointError(f"{name} holds no model or model0, model1, ...; found {found}")
        # Of each virtual stage the tensors by their current names.
        self.chunks = [{canonical(n): t for n, t in _flat(tree[key], "")} for key in models]


def _flat(tree: Any, prefix: str) -> Iterator[tuple[str, LazyTensor]]:
    if isinstance(tree, LazyTensor):
        yield prefix, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


class _Opening:
    """The way from the files of all ranks to a checkpoint."""

    def __init__(self, files: RankFiles, ranks: Sequence[Sequence[_Rank]]) -> None:
        self.where = str(files.where)
        self.pipeline, self.tensor = len(ranks), len(ranks[0])
        self.first: Mapping[str, Any] = ranks[0][0].tree
        self.iteration = files.iteration(self.first.get("iteration"))
        self.virtual = len(ranks[0][0].chunks)
        self.arguments = given_arguments(self.first.get("args"), self.where)
        self.notes: list[str] = []
        self._check_ranks()
        if any(len(rank.chunks) != self.virtual for row in ranks for rank in row):
            raise CheckpointError(f"{self.where}: not all ranks hold {self.virtual} virtual stages")
        # Of each stage, the tensors of each tensor rank.
        self.held = [
            [rank.chunks[chunk] for rank in row] for chunk in range(self.virtual) for row in ranks
        ]

    def _check_ranks(self) -> None:
        """Fewer files than the arguments speak of are a part of a model."""
        given = self.arguments
        said = (
            given.get("tensor_model_parallel_size", given.get("model_parallel_size")),
            given.get("pipeline_model_parallel_size"),
        )
        for what, number, found in zip(
            ("tensor", "pipeline"), said, (self.tensor, self.pipeline), strict=True
        ):
            if isinstance(number, int) and number != found:
                raise CheckpointError(
                    f"{self.where}: args speak of {number} {what} ranks, found files of {found}"
                )

    def checkpoint(
        self, archives: ExitStack, vocab_size: int | None, heads: int | None, version: int | None
    ) -> MegatronCheckpoint:
        parts = self._named_parts()
        if WORD_EMBEDDINGS not in parts:
            raise CheckpointError(f"{self.where} holds no {WORD_EMBEDDINGS}")
        self._check_tensors(parts)
        version = self._version(version)
        shapes = {
            name: joined_shape(name, each[0].shape, self.tensor) for name, each in parts.items()
        }
        stored = Stored(self.where, self.arguments, shapes, parts[WORD_EMBEDDINGS][0].dtype)
        model, assumptions = model_config(stored, heads=heads, vocab_size=vocab_size)
        self._check_heads(model, version)
        padded = shapes[WORD_EMBEDDINGS][0]
        specs = model_specs(model, padded)
        absent = missing_heads(without_padding(shapes, model, padded), specs, self.where)
        if "optimizer" in self.first:
            self.notes.append("the optimizer's state is left out")
        tokenizer_type = self.arguments.get("tokenizer_type")
        checkpoint = MegatronCheckpoint(
            model=model,
            iteration=self.iteration,
            version=version,
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual=self.virtual,
            missing_heads=absent,
            tokenizer_type=tokenizer_type if isinstance(tokenizer_type, str) else None,
            tokenizer_files=tuple(tokenizer_files(self.arguments)),
            notes=(*self.notes, *assumptions, *_differences(parts)),
            _specs=specs,
            _parts=parts,
            _archives=archives,
        )
        if has_no_head_bias(model) and LM_HEAD_BIAS in parts:
            if checkpoint.read(LM_HEAD_BIAS).any():
                raise CheckpointError(
                    f"{self.where}: args.add_bias_linear is off, but {LM_HEAD_BIAS} is not zero"
                )
            del parts[LM_HEAD_BIAS]
        return checkpoint

    def _check_tensors(self, parts: _Parts) -> None:
        """Weights are floating, and before anything is made for each layer, all have tensors."""
        for name, (first, *_) in parts.items():
            if not first.dtype.is_floating_point:
                raise CheckpointError(
                    f"{self.where}: {name} is of {first.dtype}, expected a floating type"
                )
        for stack in ("encoder", "decoder"):
            if (layers := layers_of(stack, parts)) > len(parts):
                raise CheckpointError(
                    f"{self.where}: {len(parts)} tensors, but one of layer {layers - 1}"
                )

    def _version(self, stated: int | None) -> int:
        found = self.first.get("checkpoint_version")
        version = found if stated is None else stated
        if version is None:
            self.notes.append("the checkpoint does not say its version: 0 is assumed")
            version = 0
        if isinstance(version, bool) or version not in rows.VERSIONS:
            raise CheckpointError(
                f"{self.where}: checkpoint version {version}, what can be read is 0, 1, 2 and 3"
            )
        return int(version)

    def _check_heads(self, model: ModelConfig, version: int) -> None:
        heads, groups = model.num_attention_heads, model.key_value_heads
        if groups % self.tensor or heads % groups:
            raise CheckpointError(
                f"{self.where}: {heads} heads in {groups} groups on {self.tensor} tensor ranks"
            )
        if version < 2 and groups != heads:
            raise CheckpointError(
                f"{self.where}: checkpoint version {version} knows no {groups} groups of "
                f"{heads} heads; 2 and 3 do"
            )

    def _named_parts(self) -> _Parts:
        """The tensors by our names, each from the first stage that holds it."""
        found: _Parts = {}
        for stage, ranks in zip(self._stages(), self.held, strict=True):
            for name in ranks[0]:
                if not is_of_model(name):
                    self.notes.append(f"left out: {name}, which belongs to no pretrained model")
                    continue
                parts = self._on_all_ranks(name, ranks)
                owned = found.setdefault(global_name(name, stage), parts)
                if owned[0].shape != parts[0].shape:
                    raise CheckpointError(
                        f"{self.where}: {name} of stage {stage.index} is "
                        f"{list(parts[0].shape)}, but {list(owned[0].shape)} on another stage"
                    )
        return found

    def _on_all_ranks(
        self, name: str, ranks: Sequence[Mapping[str, LazyTensor]]
    ) -> tuple[LazyTensor, ...]:
        for number, rank in enumerate(ranks):
            if name not in rank:
                raise CheckpointError(f"{self.where}: tensor rank {number} holds no {name}")
            found, first = rank[name], ranks[0][name]
            if (found.shape, found.dtype) != (first.shape, first.dtype):
                raise CheckpointError(
                    f"{self.where}: {name} is {list(found.shape)} {found.dtype} on tensor rank "
                    f"{number}, but {list(first.shape)} {first.dtype} on rank 0"
                )
        return tuple(rank[name] for rank in ranks)

    def _stages(self) -> tuple[Stage, ...]:
        encoder, decoder = (
            [layers_of(stack, ranks[0]) for ranks in self.held] for stack in ("encoder", "decoder")
        )
        if not any(decoder):
            return stages(encoder)
        if len(self.held) == 1:
            return encoder_decoder_stages(encoder, decoder, 0)
        if self.virtual > 1:
            raise CheckpointError(f"{self.where}: virtual stages of an encoder and a decoder")
        split = next(index for index, layers in enumerate(decoder) if layers)
        return encoder_decoder_stages(encoder[:split], decoder[split:], split)


def _differences(parts: _Parts) -> Iterator[str]:
    """A note where what all tensor ranks hold is not the same on all; only small tensors."""
    different = [
        name
        for name, each in parts.items()
        if split_dim(name) is None and math.prod(each[0].shape) <= _COMPARED and not _equal(each)
    ]
    if different:
        yield (
            f"tensor ranks hold different values of {len(different)} tensors that each holds "
            f"whole, such as {different[0]}: those of rank 0 are taken"
        )


def _equal(parts: Sequence[LazyTensor]) -> bool:
    if len(parts) == 1:
        return True
    first = parts[0].read()
    return all(torch.equal(first, other.read()) for other in parts[1:])
