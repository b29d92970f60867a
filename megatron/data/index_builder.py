"""Which sentences make which sample of BERT, in which order.

The documents are walked through once for each epoch. Within a document, sentences are put together
until they reach a target length: nearly always all the tokens that fit, sometimes a random shorter
one, so that the model also meets short inputs. A rest too small for a sample of its own stays with
the last one. Then the samples of the epoch are shuffled.

Randomness comes from splitmix64 by counter, so epoch e of a dataset is the same on every machine,
whichever epochs are built before it. The loop runs in C++ (csrc/data/index.cpp) where the extension
is built; `bert_samples_twin` specifies it and takes its place in a plain source tree.
"""

import importlib
import itertools
from types import ModuleType

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ORDER, _LENGTHS = 1, 0  # what the two streams of random numbers decide


def _find_extension() -> ModuleType | None:
    try:
        return importlib.import_module("megatron.data._index")
    except ImportError:
        return None


_EXTENSION = _find_extension()


def bert_samples(
    documents: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int32],
    *,
    max_tokens: int,
    min_sentences: int,
    short_seq_prob: float,
    seed: int,
    first_epoch: int,
    epochs: int,
) -> npt.NDArray[np.int64]:
    """The samples of `epochs` epochs from `first_epoch` on: i64 [samples, 3].

    documents: i64 [documents + 1], where each document's sentences begin; sizes: i32 [sentences],
    tokens of each. A row holds the first sentence, the one behind the last, and the target length
    in tokens, from 2 to `max_tokens`. Documents of less than `min_sentences` are left out.
    """
    build = _EXTENSION.bert_samples if _EXTENSION else bert_samples_twin
    samples: npt.NDArray[np.int64] = build(
        np.require(documents, np.int64, ["C", "A"]),
        np.require(sizes, np.int32, ["C", "A"]),
        max_tokens,
        min_sentences,
        round(short_seq_prob * 2**32),
        seed % 2**64,
        first_epoch,
        epochs,
    )
    return samples


def bert_samples_twin(
    documents: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int32],
    max_tokens: int,
    min_sentences: int,
    short_threshold: int,
    seed: int,
    first_epoch: int,
    epochs: int,
) -> npt.NDArray[np.int64]:
    """As `bert_samples`; `short_threshold` is the probability of a shorter sample times 2^32."""
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
        order = random64(_key(seed, _ORDER, epoch), np.arange(len(samples), dtype=np.uint64))
        parts.append(samples[np.argsort(order, kind="stable")])
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
