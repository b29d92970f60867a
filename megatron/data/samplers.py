"""Which samples go into which micro-batch of which data-parallel rank.

A global batch holds the samples of the order that follow those of the one before. Of a global batch
of G, data rank d of D takes the d-th contiguous share, G/D samples, in micro-batches. So what a
step trains on depends neither on the number of ranks nor on the micro-batch size, a run resumes
from the number of samples consumed, and a batch that grows in the course of a run (`BatchSize` as a
function) leaves the order of the samples as it is.

With G = 8, D = 2 and micro-batches of 2, the first step is
    data rank 0: [0, 1] [2, 3]        data rank 1: [4, 5] [6, 7]
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

# The samples of every global batch, or of the one that begins after so many samples consumed.
BatchSize = int | Callable[[int], int]


class MicroBatchSampler:
    """Yields the sample numbers of each micro-batch of one data rank, from `consumed_samples` on.

    cyclic: go on for ever, through another permutation of the samples in each epoch; otherwise
    stop before the first global batch that the samples do not fill. Raises ValueError where a
    global batch cannot be shared out or there is no sample to go on with.
    """

    def __init__(
        self,
        samples: int,
        *,
        consumed_samples: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        global_batch_size: BatchSize,
        cyclic: bool,
        seed: int,
    ) -> None:
        if samples == 0:
            raise ValueError("the dataset has no samples")
        self._samples = samples
        self._consumed = consumed_samples
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._global_batch_size = global_batch_size
        self._cyclic = cyclic
        self._permutation = functools.lru_cache(2)(functools.partial(_permutation, samples, seed))
        self._batch_at(consumed_samples)  # a batch that cannot be shared out is refused at once

    def __iter__(self) -> Iterator[list[int]]:
        start = self._consumed
        while self._cyclic or start < self._samples:
            batch = self._batch_at(start)
            if not self._cyclic and start + batch > self._samples:
                return
            share = batch // self._data_size
            begin = start + self._data_rank * share
            for first in range(begin, begin + share, self._micro_batch_size):
                yield [self._sample(i) for i in range(first, first + self._micro_batch_size)]
            start += batch

    def _batch_at(self, consumed: int) -> int:
        """The samples of the global batch that begins there."""
        size = self._global_batch_size
        batch = size(consumed) if callable(size) else size
        if batch <= 0 or batch % (self._micro_batch_size * self._data_size) != 0:
            at = f" at {consumed} consumed samples" if callable(size) else ""
            raise ValueError(
                f"--global-batch-size {batch}{at} is not divisible by --micro-batch-size "
                f"{self._micro_batch_size} times the data-parallel size {self._data_size}"
            )
        return batch

    def _sample(self, position: int) -> int:
        if not self._cyclic:
            return position
        epoch, offset = divmod(position, self._samples)
        return int(self._permutation(epoch)[offset])


def _permutation(samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    return random.permutation(samples)
