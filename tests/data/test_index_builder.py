"""Properties of the samples that sentences are put together to, in C++ and in the Python twin."""

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data import index_twin
from megatron.data.index_builder import sentence_samples, token_samples
from tests.data.support import EXAMPLES

Corpus = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]

try:
    extension: Any = importlib.import_module("megatron.data._index")
except ImportError:
    extension = None
needs_extension = pytest.mark.skipif(
    extension is None, reason="the C++ extension megatron.data._index is not built"
)


@st.composite
def corpora(draw: st.DrawFn) -> Corpus:
    """Document boundaries and sentence sizes; the documents may begin and end inside the corpus."""
    counts = draw(st.lists(st.integers(0, 12), min_size=1, max_size=20))
    bounds = np.cumsum([draw(st.integers(0, 3)), *counts])
    total = int(bounds[-1]) + draw(st.integers(0, 3))
    sizes = draw(st.lists(st.integers(0, 40), min_size=total, max_size=total))
    return bounds.astype(np.int64), np.array(sizes, np.int32)


rules = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(2, 64),
        "min_sentences": st.integers(1, 2),
        "short_seq_prob": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        "seed": st.integers(0, 2**64 - 1),
    }
)


@needs_extension
@given(corpus=corpora(), rule=rules, first=st.integers(0, 2**40), epochs=st.integers(0, 4))
@EXAMPLES
def test_the_extension_equals_its_twin(
    corpus: Corpus, rule: dict[str, Any], first: int, epochs: int
) -> None:
    threshold = round(rule["short_seq_prob"] * 2**32)
    arguments = (rule["max_tokens"], rule["min_sentences"], threshold, rule["seed"], first, epochs)
    compiled = extension.sentence_samples(*corpus, *arguments)
    twin = index_twin.sentence_samples(*corpus, *arguments)
    assert compiled.dtype == twin.dtype == np.int64
    np.testing.assert_array_equal(compiled, twin)


@needs_extension
@pytest.mark.parametrize("bounds", [[0, 9], [2, 1], [-1, 2]])
def test_the_extension_stays_within_the_corpus(bounds: list[int]) -> None:
    sizes = np.ones(4, np.int32)
    with pytest.raises(ValueError, match="document boundaries"):
        extension.sentence_samples(np.array(bounds), sizes, 8, 1, 0, 0, 0, 1)


lengths_of_documents = st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(
    lambda lengths: sum(lengths) > 1
)


@needs_extension
@given(
    lengths=lengths_of_documents,
    data=st.data(),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 3) | st.integers(0, 2**40),
    epochs=st.integers(0, 4),
)
@EXAMPLES
def test_the_extension_cuts_streams_as_its_twin(
    lengths: list[int], data: st.DataObject, seed: int, first: int, epochs: int
) -> None:
    documents = np.array(lengths, np.int64)
    s = data.draw(st.integers(1, sum(lengths) - 1))
    compiled = extension.token_samples(documents, s, seed, first, epochs)
    twin = index_twin.token_samples(documents, s, seed, first, epochs)
    assert compiled.dtype == twin.dtype == np.int64
    np.testing.assert_array_equal(compiled, twin)
    compiled = extension.document_order(len(lengths), seed, first, epochs)
    np.testing.assert_array_equal(
        compiled, index_twin.document_order(len(lengths), seed, first, epochs)
    )


@given(lengths=lengths_of_documents, data=st.data(), seed=st.integers(0, 2**64 - 1))
@EXAMPLES
def test_epochs_of_a_stream_do_not_depend_on_how_they_are_built(
    lengths: list[int], data: st.DataObject, seed: int
) -> None:
    documents = np.array(lengths, np.int64)
    s = data.draw(st.integers(1, sum(lengths) - 1))
    rule = {"seq_length": s, "seed": seed}
    together = token_samples(documents, **rule, first_epoch=2, epochs=3)
    alone = [token_samples(documents, **rule, first_epoch=e, epochs=1) for e in (2, 3, 4)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


@needs_extension
@pytest.mark.parametrize(("lengths", "s"), [([4, 4], 8), ([], 1), ([9, -1], 2), ([9], 0)])
def test_the_extension_cuts_no_stream_that_holds_no_sample(lengths: list[int], s: int) -> None:
    with pytest.raises(ValueError, match="hold no sample|negative length"):
        extension.token_samples(np.array(lengths, np.int64), s, 0, 0, 1)


@needs_extension
@given(weights=st.lists(st.integers(1, 2**58), min_size=1, max_size=8), first=st.integers(0, 300))
@EXAMPLES
def test_the_extension_blends_as_its_twin(weights: list[int], first: int) -> None:
    none = [0] * len(weights)
    start = index_twin.interleave(weights, none, first)
    counts = np.bincount(start[:, 0], minlength=len(weights)).tolist()
    compiled = extension.interleave(weights, counts, 200)
    np.testing.assert_array_equal(compiled, index_twin.interleave(weights, counts, 200))
    whole = extension.interleave(weights, none, first + 200)
    np.testing.assert_array_equal(whole, np.concatenate([start, compiled]))


@needs_extension
@pytest.mark.parametrize("weights", [[], [1], [1, 0], [2**62, 1]])
def test_the_extension_blends_nothing_without_weights(weights: list[int]) -> None:
    with pytest.raises(ValueError, match="a blend needs"):
        extension.interleave(weights, [0, 0], 9)


@given(corpus=corpora(), rule=rules)
@EXAMPLES
def test_an_epoch_holds_every_sentence_once(corpus: Corpus, rule: dict[str, Any]) -> None:
    documents, _ = corpus
    rows = sentence_samples(*corpus, **rule, first_epoch=0, epochs=1)
    used = [sentence for first, end, _ in rows for sentence in range(first, end)]
    lengths = np.diff(documents)
    whole = [
        sentence
        for start, length in zip(documents, lengths, strict=False)
        if length >= rule["min_sentences"]
        for sentence in range(start, start + length)
    ]
    assert sorted(used) == whole


@given(corpus=corpora(), rule=rules)
@EXAMPLES
def test_samples_keep_to_the_rule(corpus: Corpus, rule: dict[str, Any]) -> None:
    documents, sizes = corpus
    for first, end, target in sentence_samples(*corpus, **rule, first_epoch=3, epochs=2):
        assert end - first >= rule["min_sentences"]
        document = np.searchsorted(documents, first, side="right")
        assert end <= documents[document], "a sample does not pass the end of its document"
        assert 2 <= target <= rule["max_tokens"]
        if rule["short_seq_prob"] == 0:
            assert target == rule["max_tokens"]
        # Without its last sentence it was too short, or the rest too small to stand alone.
        enough = end - 1 - first >= rule["min_sentences"]
        if enough and documents[document] - (end - 1) >= rule["min_sentences"]:
            assert sizes[first : end - 1].sum() < target


@given(corpus=corpora(), rule=rules, first=st.integers(0, 5), epochs=st.integers(1, 4))
@EXAMPLES
def test_epochs_do_not_depend_on_each_other(
    corpus: Corpus, rule: dict[str, Any], first: int, epochs: int
) -> None:
    together = sentence_samples(*corpus, **rule, first_epoch=first, epochs=epochs)
    alone = [
        sentence_samples(*corpus, **rule, first_epoch=first + i, epochs=1) for i in range(epochs)
    ]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_short_samples_come_as_often_as_asked() -> None:
    documents = np.arange(0, 40_001, 2, dtype=np.int64)
    sizes = np.full(40_000, 100, np.int32)
    rows = sentence_samples(
        documents,
        sizes,
        max_tokens=101,
        min_sentences=2,
        short_seq_prob=0.1,
        seed=5,
        first_epoch=0,
        epochs=1,
    )
    targets = rows[:, 2]
    assert abs((targets < 101).mean() - 0.1 * 99 / 100) < 0.01
    short = targets[targets < 101]
    assert abs(short.mean() - 51) < 3  # uniform from 2 to 100


def test_any_seed_will_do() -> None:
    documents, sizes = np.array([0, 4], np.int64), np.full(4, 3, np.int32)
    rule = {"max_tokens": 8, "min_sentences": 1, "short_seq_prob": 0.5}
    rows = [
        sentence_samples(documents, sizes, **rule, seed=seed, first_epoch=0, epochs=9)
        for seed in (5, 5 + 2**64)
    ]
    np.testing.assert_array_equal(*rows)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    documents = np.arange(0, 401, 2, dtype=np.int64)
    sizes = np.full(400, 10, np.int32)

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        rows = sentence_samples(
            documents,
            sizes,
            max_tokens=20,
            min_sentences=2,
            short_seq_prob=0.0,
            seed=seed,
            first_epoch=epoch,
            epochs=1,
        )
        return tuple(rows[:, 0].tolist())

    orders = {order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert tuple(range(0, 400, 2)) not in orders


def test_the_numbers_are_those_of_splitmix64() -> None:
    # The generator's first outputs from 0 and 1234567, as its authors' reference code gives them.
    n = np.arange(3, dtype=np.uint64)
    assert index_twin.random64(0, n)[0] == 0xE220A8397B1DCDAF
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert index_twin.random64(1234567, n).tolist() == expected
