"""This project's own checkpoints, read and written without holding the model.

Training saves what it has in memory. Here nothing is in memory: a `PromisedTensor` tells
torch.distributed.checkpoint which boxes a global tensor is to be stored in, and the values are read
from wherever they come when the box is written. Boxes are blocks of rows of a bounded size, so that
reading them again needs no more than a tensor and a box.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron.checkpoint.reader import Checkpoint, is_optimizer
from megatron.checkpoint.save_load import CheckpointWriter, write_checkpoint
from megatron.checkpoint.sharded import GlobalTensor
from megatron.checkpoint.tensor_source import TensorSource
from megatron.config import (
    Config,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.conversion.stored_model import StoredModel, TokenizerFiles
from megatron.mpu import ParallelState
from megatron.optimizer.lr_schedule import build_schedule

_BOX_BYTES = 64 * 2**20
_FILE = "__0_0.distcp"  # as DCP calls the only file of the only rank
# What a run of the converted model would state for itself.
_USUAL_LEARNING_RATE = 1e-4


def read_native(directory: Path) -> StoredModel:
    """The latest checkpoint of a run's directory; no tensor is read yet.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    checkpoint = Checkpoint.open(directory)
    state = {key: value for key, value in checkpoint.run_state.items() if key != "optimizer"}
    left = any(map(is_optimizer, checkpoint.stored.shapes))
    return StoredModel(
        "native",
        checkpoint.path,
        checkpoint.config.model,
        _Weights(checkpoint),
        iteration=checkpoint.iteration,
        tokenizer=_tokenizer_of(checkpoint),
        config=checkpoint.config,
        run_state=state,
        notes=("the optimizer's state was left behind",) if left else (),
    )


def write_native(
    directory: Path, stored: StoredModel, source: TensorSource, *, iteration: int
) -> None:
    """Write the model as the checkpoint of `iteration`, and the latest, in `directory`.

    source: the model's tensors, perhaps counted on their way.

    Raises:
        CheckpointError: it could not be written.
    """
    config = _config(stored)
    run_state = {
        "samples": 0,
        "learning_rates": build_schedule(config, global_batch_size=1).state_dict(),
        **stored.run_state,
        "iteration": iteration,
    }
    last = _LastRead(source)
    write_checkpoint(
        directory,
        iteration,
        {name: PromisedTensor(name, last) for name in source.shapes},
        run_state,
        config=config,
        state=ParallelState.single(),
        files=list(stored.tokenizer.named.values()),
        writer=_StreamedWriter,
    )


class PromisedTensor(GlobalTensor):
    """A global tensor that is read from a source, block by block of rows, when it is written."""

    source: TensorSource
    name_there: str

    @staticmethod
    def __new__(cls, name: str, source: TensorSource) -> PromisedTensor:
        tensor = GlobalTensor.__new__(
            cls, source.shapes[name], (), dtype=source.dtypes[name], device=torch.device("cpu")
        )
        assert isinstance(tensor, PromisedTensor)
        tensor.source, tensor.name_there = source, name
        return tensor

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        """The blocks of rows to write."""
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties(dtype=self.dtype),
                    size=torch.Size(self.shape),
                ),
            )
            for chunk in self._chunks()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        """The values of the block at `index.offset`."""
        tensor = self.source.read(self.name_there)
        if not tensor.dim():
            return tensor
        assert index.offset is not None
        first = index.offset[0]
        return tensor[first : first + self._rows_of_a_block]

    @property
    def _rows_of_a_block(self) -> int:
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return max(1, _BOX_BYTES // max(1, row))

    def _chunks(self) -> Iterator[ChunkStorageMetadata]:
        if not self.dim():
            yield ChunkStorageMetadata(torch.Size(), torch.Size())
            return
        rows, step = self.shape[0], self._rows_of_a_block
        for first in range(0, rows, step):
            origin = (first, *[0] * (self.dim() - 1))
            sizes = (min(step, rows - first), *self.shape[1:])
            yield ChunkStorageMetadata(torch.Size(origin), torch.Size(sizes))


class _StreamedWriter(CheckpointWriter):
    """Writes one box after the other; DCP's own way keeps the last box of every tensor."""

    def write_boxes(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what the plan says."""
        results = []
        with (Path(self.path) / _FILE).open("wb") as stream:
            for item in plan.items:
                first = stream.tell()
                _save(planner.resolve_data(item), stream)
                length = stream.tell() - first
                box = _StorageInfo(_FILE, first, length)
                results.append(WriteResult(item.index, length, box))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _save(tensor: torch.Tensor | BytesIO, stream: BinaryIO) -> None:
    assert isinstance(tensor, torch.Tensor)
    # A view would be saved with all that it is a view of.
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    torch.save(tensor if whole else tensor.clone(), stream)


class _LastRead:
    """Another source that keeps the tensor read last, whose blocks are asked for in turn."""

    def __init__(self, source: TensorSource) -> None:
        self.shapes, self.dtypes = source.shapes, source.dtypes
        self._source = source
        self._name: str | None = None
        self._tensor: torch.Tensor | None = None

    def read(self, name: str, /) -> torch.Tensor:
        if self._tensor is None or name != self._name:
            self._tensor = None  # before the next takes its place
            self._name, self._tensor = name, self._source.read(name)
        return self._tensor


class _Weights:
    """The weights of a checkpoint, without its optimizer and random states."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.shapes = checkpoint.weights
        self._stored = checkpoint.stored
        dtypes = checkpoint.stored.dtypes
        self.dtypes = {name: dtypes[name] for name in self.shapes}

    def read(self, name: str, /) -> torch.Tensor:
        return self._stored.read(name)


def _tokenizer_of(checkpoint: Checkpoint) -> TokenizerFiles:
    """The tokenizer whose files came with a checkpoint, each by the flag that named it."""
    data = checkpoint.config.data
    carried = {file.name: file for file in checkpoint.tokenizer_files}
    files: dict[str, Any] = {
        name: carried.get(Path(value).name)
        for name in ("vocab_file", "merge_file", "tokenizer_model")
        if (value := getattr(data, name)) is not None
    }
    return TokenizerFiles(type=data.tokenizer_type, **files)


def _config(stored: StoredModel) -> Config:
    """The source's own configuration, or that of a run of the model on one process."""
    model = stored.model
    if stored.config is not None:
        return dataclasses.replace(stored.config, model=model)
    return Config(
        model=model,
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=_USUAL_LEARNING_RATE),
        data=DataConfig(seq_length=model.max_position_embeddings, **stored.tokenizer.flags),
        train=TrainConfig(micro_batch_size=1),
    )
