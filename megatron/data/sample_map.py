"""The samples of all epochs, as memory-mapped files that are built once and shared by all ranks.

Epochs come in blocks of one file each: epoch 0, then 1 and 2, then 3 to 6, doubling until a block
holds a few million samples. What is in a block depends on the dataset and not on how long a run is,
so that asking for more samples appends to the same order. A file is named by a hash of all that
determines it; ranks and nodes may race, one of them builds.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megatron.data.files import built_once
from megatron.data.index_builder import document_order, sentence_samples, token_samples
from megatron.data.indexed_dataset import IndexedDataset, pieces
from megatron.errors import DataError

FORMAT = 1  # to be raised when the same parameters come to mean other samples
MAX_BLOCK_SAMPLES = 1 << 22


class SampleMap:
    """Row i is what a builder knows of sample i: i64 [columns]."""

    def __init__(self, paths: Sequence[Path], columns: int) -> None:
        self._paths = tuple(paths)
        self._columns = columns
        self._blocks = [open_block(path, columns) for path in self._paths]
        self._ends = np.cumsum([len(block) for block in self._blocks])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        block = self._blocks[number]
        return block[index - int(self._ends[number])]  # negative: counted from the block's end

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[Path, ...], int]]:
        return type(self), (self._paths, self._columns)  # a copy's process maps the files anew


@dataclass(frozen=True, kw_only=True)
class BlockFiles:
    """The files of a map of so many columns; identity: what determines the rows of all blocks."""

    cache_dir: Path
    name: str
    columns: int
    identity: Mapping[str, Any]

    def block(self, span: Mapping[str, int], rows: Callable[[], npt.NDArray[np.int64]]) -> Path:
        """The file of the block `span`, whose rows are computed where it does not exist yet."""
        identity = {"format": FORMAT, **self.identity, **span}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = self.cache_dir / f"{self.name}_{digest[:24]}.npy"

        def build(file: BinaryIO) -> None:
            np.save(file, rows().reshape(-1, self.columns))

        built_once(path, build)
        return path


def open_block(path: Path, columns: int) -> npt.NDArray[np.int64]:
    """The rows of a file, i64 [rows, columns]; raises DataError where it is damaged."""
    try:
        block = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged, delete it to have it made anew: {error}") from error
    if block.dtype != np.int64 or block.ndim != 2 or block.shape[1] != columns:
        raise DataError(f"{path}: damaged, delete it to have it made anew")
    return np.asarray(block)


def holds_sentences(dataset: IndexedDataset, documents: range, least: int) -> bool:
    """Whether one of some documents holds so many sentences, that is, one sample or more."""
    bounds = dataset.documents[documents.start : documents.stop + 1]
    return any(
        bool((np.diff(bounds[piece.start : piece.stop + 1]) >= least).any())
        for piece in pieces(len(documents))
    )


def build_sentence_map(
    dataset: IndexedDataset,
    documents: range,
    *,
    samples: int,
    max_tokens: int,
    min_sentences: int,
    short_seq_prob: float,
    seed: int,
    cache_dir: Path,
) -> tuple[SampleMap, int]:
    """The map of at least `samples` samples of some documents, and how many make its epoch 0.

    A row holds the first sentence, the one behind the last, and the target length in tokens. An
    empty map stands for documents that hold no sample.
    """
    rule: dict[str, Any] = {
        "max_tokens": max_tokens,
        "min_sentences": min_sentences,
        "short_seq_prob": short_seq_prob,
        "seed": seed,
    }
    files = BlockFiles(
        cache_dir=cache_dir,
        name=f"{Path(dataset.prefix).name}_sentences",
        columns=3,
        identity=_identity(dataset, documents) | rule,
    )
    boundaries = dataset.documents[documents.start : documents.stop + 1]
    paths: list[Path] = []
    known, first_epoch, per_epoch = 0, 0, 0
    while not paths or 0 < known < samples:
        span = {"first_epoch": first_epoch, "epochs": _block_epochs(len(paths), per_epoch)}
        rows = partial(sentence_samples, boundaries, dataset.sizes, **rule, **span)
        paths.append(files.block(span, rows))
        known += len(open_block(paths[-1], 3))
        per_epoch = per_epoch or known
        first_epoch += span["epochs"]
    return SampleMap(paths, 3), per_epoch


def build_token_map(
    dataset: IndexedDataset,
    documents: range,
    *,
    samples: int,
    seq_length: int,
    seed: int,
    cache_dir: Path,
) -> tuple[SampleMap, SampleMap]:
    """The map of at least `samples` stretches of the stream of some documents, and the stream.

    A row of the first holds the place in the stream of the document in which the sample begins, and
    the tokens of it that come before; a row of the second the number of the document at a place,
    counted from the first of `documents`, which together need more than `seq_length` tokens.
    """
    prefix = Path(dataset.prefix).name
    lengths = dataset.document_lengths(documents)
    tokens = int(lengths.sum())
    sample_files = BlockFiles(
        cache_dir=cache_dir,
        name=f"{prefix}_tokens",
        columns=2,
        identity=_identity(dataset, documents) | {"seq_length": seq_length, "seed": seed},
    )
    order_files = BlockFiles(
        cache_dir=cache_dir,
        name=f"{prefix}_order",
        columns=1,
        identity={"documents": len(documents), "seed": seed},
    )
    sample_paths: list[Path] = []
    order_paths: list[Path] = []
    end_epoch = 0
    while not sample_paths or (end_epoch * tokens - 1) // seq_length < samples:
        epochs = _block_epochs(len(sample_paths), max(tokens // seq_length, len(documents)))
        span = {"first_epoch": end_epoch, "epochs": epochs}
        rows = partial(token_samples, lengths, seq_length=seq_length, seed=seed, **span)
        sample_paths.append(sample_files.block(span, rows))
        order = partial(document_order, len(documents), seed=seed, **span)
        order_paths.append(order_files.block(span, order))
        end_epoch += epochs
    return SampleMap(sample_paths, 2), SampleMap(order_paths, 1)


def _identity(dataset: IndexedDataset, documents: range) -> dict[str, Any]:
    return {
        "dataset": dataset.fingerprint,
        "documents": [documents.start, documents.stop],
    }


def _block_epochs(block: int, samples_per_epoch: int) -> int:
    """Epochs of a block: they double, within what a block may hold."""
    if block == 0:
        return 1
    return min(1 << block, max(1, MAX_BLOCK_SAMPLES // samples_per_epoch))
