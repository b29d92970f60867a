"""Global tensors of our model written as a Megatron-LM checkpoint of any split.

Each rank's file is written after the other. A global tensor is read when a rank's part of it is
due, cut, put in the order of rows of the checkpoint's version, and forgotten. Where several ranks
hold parts of it, it is read again for each, so that never more than one is in memory.

What padding holds is free, and is chosen so that Megatron-LM counts it as little as it can: the
rows of the embedding repeat the last token's, for a row of zeros would score 0 where true tokens
often score less, and the padded biases of BERT and T5 are so low that their tokens are impossible.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.archive.writer import DeferredTensor, write_archive
from megatron.checkpoint.megatron_lm import rows
from megatron.checkpoint.megatron_lm.layout import (
    LATEST_FILE,
    RANK_FILE,
    iteration_directory,
    rank_directory,
)
from megatron.checkpoint.megatron_lm.names import (
    LM_HEAD_BIAS,
    WORD_EMBEDDINGS,
    Shape,
    has_no_head_bias,
    missing_heads,
    model_specs,
    name_on_stage,
    stored_path,
)
from megatron.checkpoint.megatron_lm.namespace import (
    Split,
    arguments_of,
    inexpressible,
)
from megatron.checkpoint.tensor_source import TensorSource
from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from megatron.mpu.shard_spec import ShardSpec
from megatron.mpu.stage import Stage, encoder_decoder_stages, stages

# The score of a token that is none, as the models of the lineage mask; float16 can hold it.
_IMPOSSIBLE = -10000.0


def write_megatron(
    directory: Path,
    model: ModelConfig,
    source: TensorSource,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int = 1,
    split_rank: int | None = None,
    version: int = 3,
    iteration: int | None = None,
    tokenizer_type: str | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Write a checkpoint into the run's directory and make it the latest there.

    Args:
        model: what `source` holds the tensors of; heads of BERT that it lacks are left out.
        tensor, pipeline, virtual: tensor ranks, pipeline ranks, and virtual stages of each.
        split_rank: the pipeline rank at which a T5's decoder begins; half of them where not given.
        version: of the order of rows, 0 to 3.
        iteration: None for a release.
        tokenizer_type: as Megatron-LM calls it; the usual one of the model where not given.
        on_bytes: told how many bytes of the source have been written so far.

    Returns:
        A line for each thing that one who loads the checkpoint has to know.

    Raises:
        CheckpointError: Megatron-LM cannot express the model or the split, the source does not hold
            the model's tensors, or there is such a checkpoint already.
    """
    model = _with_vocabulary(model, source)
    if pipeline > 1 and model.model_type == "t5" and split_rank is None:
        split_rank = pipeline // 2
    split = Split(tensor, pipeline, virtual, split_rank)
    problems = [*inexpressible(model, version), *_split_problems(model, split)]
    if version not in rows.VERSIONS:
        problems.append(f"checkpoint version {version} is none of 0, 1, 2 and 3")
    if problems:
        raise CheckpointError(problems)
    final = directory / iteration_directory(iteration)
    if final.exists():
        raise CheckpointError(f"{final} exists already")
    writing = _Writing(model, source, split, version, on_bytes)
    args = arguments_of(
        model,
        split,
        padded_vocab=writing.padded_vocab,
        iteration=iteration or 0,
        tokenizer_type=tokenizer_type,
        binary_head="binary_head.weight" in source.shapes,
    )
    head = {
        "args": args,
        "checkpoint_version": float(version),
        "iteration": iteration or 0,
        "tokens": 0,
    }
    aside = directory / f".{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    try:
        for p in range(pipeline):
            for t in range(tensor):
                rank = aside / rank_directory(t, p, pipeline)
                rank.mkdir(parents=True)
                write_archive(rank / RANK_FILE, head | writing.models(t, p))
        aside.rename(final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _make_latest(directory, iteration)
    return list(_notes(model, source, args.tokenizer_type if tokenizer_type is None else None))


def _with_vocabulary(model: ModelConfig, source: TensorSource) -> ModelConfig:
    shape = source.shapes.get(WORD_EMBEDDINGS)
    if shape is None:
        raise CheckpointError(f"there is no {WORD_EMBEDDINGS} to write")
    return model if model.vocab_size is not None else replace(model, vocab_size=shape[0])


def _make_latest(directory: Path, iteration: int | None) -> None:
    aside = directory / f".{LATEST_FILE}.tmp"
    aside.write_text("release" if iteration is None else str(iteration), encoding="utf-8")
    aside.replace(directory / LATEST_FILE)


def _split_problems(model: ModelConfig, split: Split) -> Iterator[str]:
    """What does not divide by the ranks, or asks for what Megatron-LM does not do."""
    by_tensor = {
        "--num-attention-heads": model.num_attention_heads,
        "--num-query-groups": model.key_value_heads,
        "--ffn-hidden-size": model.ffn_size,
    }
    for option, size in by_tensor.items():
        if size % split.tensor:
            yield (
                f"{option} {size} is not divisible by --tensor-model-parallel-size {split.tensor}"
            )
    if split.virtual > 1 and split.pipeline == 1:
        yield f"{split.virtual} virtual stages need --pipeline-model-parallel-size above 1"
    if model.model_type == "t5":
        yield from _split_problems_of_t5(model, split)
        return
    if split.split_rank is not None:
        yield f"--pipeline-model-parallel-split-rank is for t5, not for {model.model_type}"
    count = split.pipeline * split.virtual
    if model.num_layers % count:
        virtual = f" x {split.virtual} virtual stages" if split.virtual > 1 else ""
        yield (
            f"--num-layers {model.num_layers} is not divisible by "
            f"--pipeline-model-parallel-size {split.pipeline}{virtual}"
        )


def _split_problems_of_t5(model: ModelConfig, split: Split) -> Iterator[str]:
    if split.virtual > 1:
        yield f"{split.virtual} virtual stages: Megatron-LM knows one of an encoder-decoder"
    if split.split_rank is None:
        return
    option = "--pipeline-model-parallel-split-rank"
    if not 0 < split.split_rank < split.pipeline:
        yield (
            f"{option} {split.split_rank}: expected 1 to {split.pipeline - 1}, of "
            f"--pipeline-model-parallel-size {split.pipeline}"
        )
        return
    stacks = {
        "--num-layers": (model.num_layers, split.split_rank, "before"),
        "--decoder-num-layers": (
            model.decoder_layers,
            split.pipeline - split.split_rank,
            "from",
        ),
    }
    for layers_option, (layers, ranks, side) in stacks.items():
        if layers % ranks:
            yield (
                f"{layers_option} {layers} is not divisible by the {ranks} pipeline ranks {side} "
                f"{option} {split.split_rank}"
            )


def _stages(model: ModelConfig, split: Split) -> tuple[Stage, ...]:
    """The stages in the order of the layers, virtual ones included."""
    if model.model_type != "t5":
        count = split.pipeline * split.virtual
        return stages([model.num_layers // count] * count)
    if split.split_rank is None:
        return encoder_decoder_stages([model.num_layers], [model.decoder_layers], 0)
    before, behind = split.split_rank, split.pipeline - split.split_rank
    return encoder_decoder_stages(
        [model.num_layers // before] * before, [model.decoder_layers // behind] * behind, before
    )


@dataclass
class _Writing:
    """What goes into the files of the ranks, and how much of it has been written."""

    model: ModelConfig
    source: TensorSource
    split: Split
    version: int
    on_bytes: Callable[[int], None]

    def __post_init__(self) -> None:
        self.padded_vocab = self.model.padded_vocab_size(self.split.tensor)
        self.specs = model_specs(self.model, self.padded_vocab)
        self.stages = _stages(self.model, self.split)
        self.written = 0
        shapes: dict[str, Shape] = dict(self.source.shapes)
        if has_no_head_bias(self.model):
            shapes[LM_HEAD_BIAS] = self.specs[LM_HEAD_BIAS].shape
        missing_heads(shapes, self.specs, "what is written")
        self.names = [name for name in self.specs if name in shapes]

    def models(self, tensor_rank: int, pipeline_rank: int) -> dict[str, Any]:
        """The model, or the virtual stages' models, of one rank's file."""
        own = self.stages[pipeline_rank :: self.split.pipeline]
        trees = [self._tree(stage, tensor_rank) for stage in own]
        if len(trees) == 1:
            return {"model": trees[0]}
        return {f"model{number}": tree for number, tree in enumerate(trees)}

    def _tree(self, stage: Stage, tensor_rank: int) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        tied = not self.model.untie_embeddings_and_output_weights
        for name in self.names:
            on_stage = name_on_stage(name, stage, tied=tied)
            if on_stage is not None:
                *keys, last = stored_path(on_stage, self.model)
                place = tree
                for key in keys:
                    place = place.setdefault(key, {})
                place[last] = self._deferred(name, stage, tensor_rank)
        return tree

    def _deferred(self, name: str, stage: Stage, tensor_rank: int) -> DeferredTensor:
        spec, dtype = self.specs[name], self._dtypes[name]

        def make() -> torch.Tensor:
            whole = self._read(name)
            if name in self.source.shapes:
                self._report(_own_elements(spec, stage, tensor_rank, size) * dtype.itemsize)
            return self._in_their_order(name, _local_part(whole, spec, tensor_rank, size))

        size = self.split.tensor
        return DeferredTensor(spec.local_shape(size), dtype, make)

    @property
    def _dtypes(self) -> Mapping[str, torch.dtype]:
        return {LM_HEAD_BIAS: self.source.dtypes[WORD_EMBEDDINGS], **self.source.dtypes}

    def _read(self, name: str) -> torch.Tensor:
        if name in self.source.shapes:
            return self.source.read(name)
        # Megatron-LM's T5 has a bias in its head, whatever is said of biases.
        return torch.zeros(self.specs[name].shape, dtype=self._dtypes[name])

    def _in_their_order(self, name: str, part: torch.Tensor) -> torch.Tensor:
        count = rows.parts_of(name)
        if count is None:
            return part
        return rows.to_theirs(part, count, self.model.head_size, self.version)

    def _report(self, number: int) -> None:
        self.written += number
        self.on_bytes(self.written)


def _local_part(whole: torch.Tensor, spec: ShardSpec, rank: int, size: int) -> torch.Tensor:
    """What tensor rank `rank` of `size` holds of a global tensor, padding included."""
    if spec.dim is None or spec.local_shape(size) == spec.shape:
        return whole
    local = whole.new_empty(spec.local_shape(size))
    if spec.padded is not None:
        local[...] = _IMPOSSIBLE if spec.name == LM_HEAD_BIAS else whole[-1]
    for box in spec.rectangles(rank, size):
        local[box.local_slices] = whole[box.global_slices]
    return local


def _own_elements(spec: ShardSpec, stage: Stage, rank: int, size: int) -> int:
    """Elements of the source that the part holds and that no other part is counted for."""
    is_copy = "embedding." in spec.name and not stage.is_first
    if is_copy or not spec.counted(rank):
        return 0
    return sum(math.prod(box.sizes) for box in spec.rectangles(rank, size))


def _notes(
    model: ModelConfig, source: TensorSource, assumed_tokenizer: str | None
) -> Iterator[str]:
    yield "no optimizer's state is written: Megatron-LM loads it with --no-load-optim --no-load-rng"
    if assumed_tokenizer is not None:
        yield f"args.tokenizer_type is {assumed_tokenizer}, as usual for {model.model_type}"
    if model.activation == "gelu" and not model.is_gated:
        yield "the MLP's GELU is the erf form, which Megatron-LM has with --no-bias-gelu-fusion"
    built = 2 if "binary_head.weight" in source.shapes else 0
    if model.model_type == "bert" and model.num_tokentypes != built:
        yield (
            f"{model.num_tokentypes} token types: Megatron-LM's pretrain_bert.py builds {built} "
            f"{'with' if built else 'without'} a binary head"
        )
