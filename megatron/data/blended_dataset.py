"""Samples of several datasets, dealt out by their weights.

The dataset and the number of each sample stand in index files that are built once. They follow from
the weights alone, so a longer run sees the same samples first. Each dataset's own samples come in
their own order. Of the first n samples those of each dataset are its share of n, rounded down or
up; `megatron.data.index_builder` says how.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.data import sample_map
from megatron.data.index_builder import interleave
from megatron.data.sample_map import BlockFiles, SampleMap, open_block
from megatron.data.samples import Sample, SampleDataset

PRECISION = 1 << 60  # weights are rounded to this part of their sum
FIRST_BLOCK_SAMPLES = 1 << 16


class BlendedDataset:
    """Sample i is the sample of one of `datasets` that row i of `samples` names."""

    def __init__(
        self, datasets: Sequence[SampleDataset], samples: SampleMap, *, length: int
    ) -> None:
        assert length <= len(samples)
        self._datasets = tuple(datasets)
        self._samples = samples
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        dataset, sample = self._samples[index].tolist()
        return self._datasets[dataset][sample]


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The weights as whole numbers of the same proportions, at least 1 each."""
    total = sum(map(Fraction, weights))
    return [max(1, round(Fraction(weight) / total * PRECISION)) for weight in weights]


def samples_needed(weights: Sequence[int], samples: int) -> list[int]:
    """The most samples of each dataset that `samples` samples of a blend can hold, at least 1."""
    return [max(1, -(-samples * weight // sum(weights))) for weight in weights]


def build_blend_map(weights: Sequence[int], *, samples: int, cache_dir: Path) -> SampleMap:
    """The map of at least `samples` samples of a blend; a row holds a dataset and its sample."""
    files = BlockFiles(
        cache_dir=cache_dir, name="blend", columns=2, identity={"weights": list(weights)}
    )
    paths: list[Path] = []
    known = 0
    while known < samples:
        size = min(FIRST_BLOCK_SAMPLES << len(paths), sample_map.MAX_BLOCK_SAMPLES)

        def rows(size: int = size) -> npt.NDArray[np.int64]:
            return interleave(weights, _counts(paths, len(weights)), size)

        paths.append(files.block({"first": known, "samples": size}, rows))
        known += size
    return SampleMap(paths, 2)


def _counts(paths: Sequence[Path], datasets: int) -> list[int]:
    """The samples of each dataset in some blocks."""
    counts = np.zeros(datasets, np.int64)
    for path in paths:
        counts += np.bincount(open_block(path, 2)[:, 0], minlength=datasets)
    return [int(count) for count in counts]
