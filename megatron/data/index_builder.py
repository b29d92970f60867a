"""Which pieces of a corpus make which sample, in which order: the loops over whole datasets.

`sentence_samples`, for BERT and T5. The documents are walked through once for each epoch. Within a
document, sentences are put together until they reach a target length: nearly always all the tokens
that fit, sometimes a random shorter one, so that the model also meets short inputs. A rest too
small for a sample of its own stays with the last one.

`token_samples`, for GPT. In each epoch the documents come in another order (`document_order`). All
of them, epoch after epoch, are one endless stream of tokens; sample i is the stretch of s + 1
tokens from token i * s on. So each sample begins with the token that the one before ends with, and
in every epoch every token is predicted once; only the very first of the stream never is. A sample
that reaches from one epoch into the next belongs to the one with its last token. With documents of
3, 2 and 5 tokens, s = 4, and document c in front in the first epoch:

    stream   c0 c1 c2 c3 c4 a0 a1 a2 b0 b1 | b0 b1 c0 c1 ...
    samples  |---- 0 ----|---- 1 ----|---- 2 ----|

The samples of an epoch are then shuffled. Randomness comes from splitmix64 by counter, so epoch e
of a dataset is the same on every machine, whichever epochs are built before it.

`interleave` deals out the samples of a blend. Sample j of a dataset whose share is w may come from
place floor(j / w) on and has to come before place ceil((j + 1) / w). To always take the dataset
whose sample has to come soonest meets all of these bounds (Baruah et al., Proportionate progress,
1996), so that n samples hold n * w of each dataset, rounded down or up.

The loops run in C++ (csrc/data/index.cpp) where the extension is built, else in `index_twin`.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data import index_twin


def _find(name: str) -> Callable[..., Any]:
    """The function of the extension, or its twin where that is not built or older than this."""
    twin: Callable[..., Any] = getattr(index_twin, name)
    try:
        extension = importlib.import_module("megatron.data._index")
    except ImportError:
        return twin
    return getattr(extension, name, twin)


_sentence_samples = _find("sentence_samples")
_document_order = _find("document_order")
_token_samples = _find("token_samples")
_interleave = _find("interleave")


def sentence_samples(
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
    samples: npt.NDArray[np.int64] = _sentence_samples(
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


def document_order(
    documents: int, *, seed: int, first_epoch: int, epochs: int
) -> npt.NDArray[np.int64]:
    """The numbers of all documents in the order of each epoch, i64 [epochs * documents]."""
    order: npt.NDArray[np.int64] = _document_order(documents, seed % 2**64, first_epoch, epochs)
    return order


def token_samples(
    lengths: npt.NDArray[np.int64], *, seq_length: int, seed: int, first_epoch: int, epochs: int
) -> npt.NDArray[np.int64]:
    """The samples of `epochs` epochs from `first_epoch` on: i64 [samples, 2].

    lengths: i64 [documents], tokens of each; more than `seq_length` in all. A row holds the place
    in the stream's `document_order` of the document in which the sample begins, counted from the
    first epoch's first document, and how many tokens of it come before.
    """
    assert lengths.sum() > seq_length > 0
    samples: npt.NDArray[np.int64] = _token_samples(
        np.require(lengths, np.int64, ["C", "A"]), seq_length, seed % 2**64, first_epoch, epochs
    )
    return samples


def interleave(
    weights: Sequence[int], counts: Sequence[int], samples: int
) -> npt.NDArray[np.int64]:
    """The next `samples` samples of a blend: i64 [samples, 2], a dataset and its own sample.

    weights: of each dataset, at least 1 and at most 2^62 in all; counts: samples of each that came
    before.
    """
    assert min(weights) > 0 and sum(weights) <= 1 << 62
    rows: npt.NDArray[np.int64] = _interleave(list(weights), list(counts), samples)
    return rows
