"""The samples of all epochs, as memory-mapped files that are built once and shared by all ranks.

Epochs come in blocks of one file each: epoch 0, then 1 and 2, then 3 to 6, doubling until a block
holds a few million samples. What is in a block depends on the dataset and not on how long a run is,
so that asking for more samples appends to the same order. A file is named by a hash of all that
determines it; ranks and nodes may race, one of them builds.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megatron.data.files import built_once
from megatron.data.index_builder import bert_samples
from megatron.data.indexed_dataset import IndexedDataset
from megatron.errors import DataError

FORMAT = 1  # to be raised when the same parameters come to mean other samples
MAX_BLOCK_SAMPLES = 1 << 22


class SampleMap:
    """Row i is sample i: i64 [3], first sentence, the one behind the last, target tokens."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._blocks = [_open_block(path) for path in self._paths]
        self._ends = np.cumsum([len(block) for block in self._blocks])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        block = self._blocks[number]
        return block[index - int(self._ends[number])]  # negative: counted from the block's end

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[Path, ...]]]:
        return type(self), (self._paths,)  # a process that gets a copy maps the files anew


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

    An empty map stands for documents that hold no sample.
    """
    rule: dict[str, Any] = {
        "max_tokens": max_tokens,
        "min_sentences": min_sentences,
        "short_seq_prob": short_seq_prob,
        "seed": seed,
    }
    identity = {
        "format": FORMAT,
        "dataset": dataset.fingerprint,
        "documents": [documents.start, documents.stop],
        **rule,
    }
    boundaries = dataset.documents[documents.start : documents.stop + 1]
    paths: list[Path] = []
    known, first_epoch, per_epoch = 0, 0, 0
    while not paths or 0 < known < samples:
        epochs = _block_epochs(len(paths), per_epoch)
        span = {"first_epoch": first_epoch, "epochs": epochs}

        def build(file: BinaryIO, span: dict[str, int] = span) -> None:
            np.save(file, bert_samples(boundaries, dataset.sizes, **rule, **span))

        paths.append(_block_path(cache_dir, dataset, identity | span))
        built_once(paths[-1], build)
        known += len(_open_block(paths[-1]))
        per_epoch = per_epoch or known
        first_epoch += epochs
    return SampleMap(paths), per_epoch


def _block_epochs(block: int, samples_per_epoch: int) -> int:
    """Epochs of a block: they double, within what a block may hold."""
    if block == 0:
        return 1
    return min(1 << block, max(1, MAX_BLOCK_SAMPLES // samples_per_epoch))


def _block_path(cache_dir: Path, dataset: IndexedDataset, identity: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_dir / f"{Path(dataset.prefix).name}_bert_{digest[:24]}.npy"


def _open_block(path: Path) -> npt.NDArray[np.int64]:
    try:
        block = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged, delete it to have it made anew: {error}") from error
    if block.dtype != np.int64 or block.ndim != 2 or block.shape[1] != 3:
        raise DataError(f"{path}: damaged, delete it to have it made anew")
    return np.asarray(block)
