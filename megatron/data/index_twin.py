"""The index builders in Python: the specification of csrc/data/index.cpp, and what takes its place.

Every function gives the numbers that the C++ function of its name gives; tests compare the two.
"""

import heapq
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LENGTHS, _SAMPLES, _DOCUMENTS = 0, 1, 2  # what the streams of random numbers decide


def sentence_samples(
    documents: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int32],
    max_tokens: int,
    min_sentences: int,
    short_threshold: int,
    seed: int,
    first_epoch: int,
    epochs: int,
) -> npt.NDArray[np.int64]:
    """As `index_builder.sentence_samples`; short_threshold: short_seq_prob times 2^32."""
    parts = [np.zeros((0, 3), np.int64)]
    for epoch in range(first_epoch, first_epoch + epochs):
        # Every sample holds a sentence at least, so that these targets suffice.
        most = np.arange(documents[-1] - documents[0] + 1, dtype=np.uint64)
        random = random64(_key(seed, _LENGTHS, epoch), most)
        shorter = 2 + (
            ((random & np.uint64(0xFFFFFFFF)) * np.uint64(max_tokens - 1)) >> np.uint64(32)
        )
        is_short = (random >> np.uint64(32)) < short_threshold
        targets = np.where(is_short, shorter.astype(np.int64), max_tokens)
        rows = _epoch_rows(documents.tolist(), sizes, targets.tolist(), min_sentences)
        samples = np.array(rows, np.int64).reshape(-1, 3)
        parts.append(samples[_shuffled(len(samples), _key(seed, _SAMPLES, epoch))])
    return np.concatenate(parts)


def _epoch_rows(
    documents: list[int],
    sizes: npt.NDArray[np.int32],
    targets: list[int],
    min_sentences: int,
) -> list[tuple[int, int, int]]:
    """The samples of one epoch in the order of the corpus; sample n aims at `targets[n]` tokens."""
    rows: list[tuple[int, int, int]] = []
    for first, document_end in itertools.pairwise(documents):
        if document_end - first < min_sentences:
            continue
        tokens = 0
        for end, size in enumerate(sizes[first:document_end].tolist(), start=first + 1):
            tokens += size
            target = targets[len(rows)]
            remaining = document_end - end
            is_full = (
                tokens >= target and end - first >= min_sentences and remaining >= min_sentences
            )
            if is_full or remaining == 0:
                rows.append((first, end, target))
                first, tokens = end, 0
    return rows


def document_order(
    documents: int, seed: int, first_epoch: int, epochs: int
) -> npt.NDArray[np.int64]:
    """As `index_builder.document_order`."""
    order = [
        _shuffled(documents, _key(seed, _DOCUMENTS, epoch))
        for epoch in range(first_epoch, first_epoch + epochs)
    ]
    return np.concatenate([np.zeros(0, np.int64), *order])


def token_samples(
    lengths: npt.NDArray[np.int64], seq_length: int, seed: int, first_epoch: int, epochs: int
) -> npt.NDArray[np.int64]:
    """As `index_builder.token_samples`."""
    tokens = int(lengths.sum())
    parts = [np.zeros((0, 2), np.int64)]
    for epoch in range(first_epoch, first_epoch + epochs):
        first = (epoch * tokens - 1) // seq_length if epoch else 0
        end = ((epoch + 1) * tokens - 1) // seq_length
        starts = np.arange(first, end) * seq_length
        before = max(epoch - 1, 0)  # the first sample may begin in the epoch before its last token
        order = document_order(len(lengths), seed, before, epoch + 1 - before)
        ends = before * tokens + np.cumsum(lengths[order])
        places = np.searchsorted(ends, starts, side="right")
        offsets = starts - (ends - lengths[order])[places]
        rows = np.stack([before * len(lengths) + places, offsets], axis=1)
        parts.append(rows[_shuffled(len(rows), _key(seed, _SAMPLES, epoch))])
    return np.concatenate(parts)


def interleave(
    weights: Sequence[int], counts: Sequence[int], samples: int
) -> npt.NDArray[np.int64]:
    """As `index_builder.interleave`."""
    total = sum(weights)
    numbers = list(counts)  # of the next sample of each dataset
    waiting = [(numbers[i] * total // weights[i], i) for i in range(len(weights))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    rows = []
    for n in range(sum(counts), sum(counts) + samples):
        while waiting and waiting[0][0] <= n:
            i = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-(-(numbers[i] + 1) * total // weights[i]), i))
        i = heapq.heappop(ready)[1]
        rows.append((i, numbers[i]))
        numbers[i] += 1
        heapq.heappush(waiting, (numbers[i] * total // weights[i], i))
    return np.array(rows, np.int64).reshape(-1, 2)


def random64(key: int, n: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Outputs number `n` of splitmix64 started at `key` (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):  # sums and products are meant modulo 2^64
        x = np.uint64(key) + _GOLDEN * (n + np.uint64(1))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, stream: int, epoch: int) -> int:
    """Where the generator of a stream starts in an epoch."""
    of_stream = random64(seed, np.array([stream], np.uint64))
    return int(random64(int(of_stream[0]), np.array([epoch], np.uint64))[0])


def _shuffled(count: int, key: int) -> npt.NDArray[np.int64]:
    """The numbers below `count` in the order of the random numbers that start at `key`."""
    return np.argsort(random64(key, np.arange(count, dtype=np.uint64)), kind="stable")
