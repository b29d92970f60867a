"""Which samples go into which micro-batch of which data-parallel rank.

Global batch g holds the samples g*G to (g+1)*G of the order, for G the global batch size. Data rank
d of D takes the d-th contiguous share of it, G/D samples, in micro-batches. So what a step trains
on depends neither on the number of ranks nor on the micro-batch size, and a run resumes from the
number of samples consumed.

With G = 8, D = 2 and micro-batches of 2, the first step is
    data rank 0: [0, 1] [2, 3]        data rank 1: [4, 5] [6, 7]
"""

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt


class MicroBatchSampler:
    """Yields the sample numbers of each micro-batch of one data rank, from `consumed_samples` on.

    cyclic: go on for ever, through another permutation of the samples in each epoch; otherwise
    stop before the first global batch that the samples do not fill. Raises ValueError where the
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
        global_batch_size: int,
        cyclic: bool,
        seed: int,
    ) -> None:
        if global_batch_size % (micro_batch_size * data_size) != 0:
            raise ValueError(
                f"--global-batch-size {global_batch_size} is not divisible by --micro-batch-size "
                f"{micro_batch_size} times the data-parallel size {data_size}"
            )
        if samples == 0:
            raise ValueError("the dataset has no samples")
        self._samples = samples
        self._consumed = consumed_samples
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._share = global_batch_size // data_size
        self._global_batch_size = global_batch_size
        self._cyclic = cyclic
        self._permutation = functools.lru_cache(2)(functools.partial(_permutation, samples, seed))

    def __iter__(self) -> Iterator[list[int]]:
        start = self._consumed
        while self._cyclic or start + self._global_batch_size <= self._samples:
            share = start + self._data_rank * self._share
            for first in range(share, share + self._share, self._micro_batch_size):
                yield [self._sample(i) for i in range(first, first + self._micro_batch_size)]
            start += self._global_batch_size

    def _sample(self, position: int) -> int:
        if not self._cyclic:
            return position
        epoch, offset = divmod(position, self._samples)
        return int(self._permutation(epoch)[offset])


def _permutation(samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    return random.permutation(samples)
