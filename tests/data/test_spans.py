"""Properties of span corruption."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.spans import SpanCorruption, Tokens
from megatron.errors import ConfigError
from tests.data.support import EXAMPLES

FIRST_SENTINEL = 10_000
SENTINELS = FIRST_SENTINEL + np.arange(2000)

corruptions = st.builds(
    SpanCorruption,
    mask_prob=st.floats(0.01, 0.99),
    mean_span_length=st.floats(1, 20),
    seq_length=st.integers(2, 600),
    decoder_seq_length=st.integers(3, 600),
)
PAPER = SpanCorruption(mask_prob=0.15, mean_span_length=3.0, seq_length=512, decoder_seq_length=512)


def corrupted(corruption: SpanCorruption, length: int, seed: int) -> tuple[Tokens, Tokens, Tokens]:
    """A text whose tokens tell their places, its encoder input and its target."""
    text = np.arange(length)
    encoder, target = corruption.apply(text, SENTINELS, np.random.default_rng(seed))
    return text, encoder, target


def restored(encoder: Tokens, target: Tokens) -> list[int]:
    """The text: each sentinel of the encoder input replaced by what follows it in the target."""
    spans: dict[int, list[int]] = {}
    for token in target.tolist():
        if token >= FIRST_SENTINEL:
            spans[token] = span = []
        else:
            span.append(token)
    return [t for token in encoder.tolist() for t in spans.get(token, [token])]


def drawn_text(data: st.DataObject, corruption: SpanCorruption) -> int:
    """A number of tokens, more often than not near the longest."""
    longest = corruption.longest_text
    return data.draw(st.sampled_from([longest, longest - 1]) | st.integers(0, longest))


@given(corruption=corruptions, data=st.data(), seed=st.integers(0, 2**32))
@EXAMPLES
def test_nothing_is_lost_and_everything_fits(
    corruption: SpanCorruption, data: st.DataObject, seed: int
) -> None:
    length = drawn_text(data, corruption)
    text, encoder, target = corrupted(corruption, length, seed)
    assert restored(encoder, target) == text.tolist()
    assert len(encoder) <= corruption.seq_length
    assert len(target) <= corruption.decoder_seq_length
    noise, spans = corruption.counts(length)
    assert len(encoder) == length - noise + spans
    assert len(target) == noise + spans + 1


@given(corruption=corruptions, data=st.data(), seed=st.integers(0, 2**32))
@EXAMPLES
def test_sentinels_ascend_and_spans_are_apart(
    corruption: SpanCorruption, data: st.DataObject, seed: int
) -> None:
    _, encoder, target = corrupted(corruption, drawn_text(data, corruption), seed)
    in_encoder = np.flatnonzero(encoder >= FIRST_SENTINEL)
    in_target = np.flatnonzero(target >= FIRST_SENTINEL)
    assert np.array_equal(encoder[in_encoder], SENTINELS[: len(in_encoder)])
    assert np.array_equal(target[in_target], SENTINELS[: len(in_encoder) + 1])
    assert (np.diff(in_encoder) > 1).all()  # text between any two
    assert (np.diff(in_target) > 1).all()  # no span is empty
    assert in_target[0] == 0
    assert in_target[-1] == len(target) - 1
    assert len(in_target) <= corruption.sentinels_needed


@given(corruption=corruptions)
@EXAMPLES
def test_the_longest_text_is_the_longest(corruption: SpanCorruption) -> None:
    longest = corruption.longest_text
    assert longest >= 2
    inputs = [
        n - noise + spans for n in range(longest + 2) for noise, spans in [corruption.counts(n)]
    ]
    assert max(inputs[:-1]) <= corruption.seq_length < inputs[-1]
    spans = [corruption.counts(n)[1] for n in range(longest + 1)]
    assert max(spans) + 1 == corruption.sentinels_needed


@given(length=st.integers(2, 568), mask_prob=st.floats(0.05, 0.5), mean=st.floats(1, 10))
@EXAMPLES
def test_density_and_span_length_are_those_asked_for(
    length: int, mask_prob: float, mean: float
) -> None:
    wide = SpanCorruption(mask_prob, mean, seq_length=10_000, decoder_seq_length=10_000)
    noise, spans = wide.counts(length)
    assert abs(noise - mask_prob * length) <= 0.5 or noise == 1
    # Spans that cannot be apart are joined.
    assert abs(spans - noise / mean) <= 0.5 or spans in (1, length - noise + 1)


def test_inputs_are_filled_and_targets_of_the_size_of_the_paper() -> None:
    assert PAPER.longest_text == 569
    noise, spans = PAPER.counts(569)
    assert (noise, spans) == (85, 28)
    assert 569 - noise + spans == 512
    assert noise + spans + 1 == 114  # what T5's published configuration gives its targets


def test_the_same_seed_gives_the_same_spans() -> None:
    _, encoder, target = corrupted(PAPER, 400, seed=5)
    _, again, target_again = corrupted(PAPER, 400, seed=5)
    assert np.array_equal(encoder, again)
    assert np.array_equal(target, target_again)
    assert not np.array_equal(encoder, corrupted(PAPER, 400, seed=6)[1])


def test_every_placement_is_as_likely_as_any_other() -> None:
    # 3 tokens of noise of 7 in 2 spans: lengths 1+2 or 2+1, gaps (a, b, c) of 4 with b >= 1.
    corruption = SpanCorruption(3 / 7, 1.5, seq_length=64, decoder_seq_length=64)
    assert corruption.counts(7) == (3, 2)
    draws = 6000
    counts = Counter(tuple(corrupted(corruption, 7, seed)[1].tolist()) for seed in range(draws))
    assert len(counts) == 2 * 10
    expected = draws / 20
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 43.8  # 0.1 % of fair draws, at 19 degrees of freedom


def test_a_short_decoder_takes_fewer_spans() -> None:
    narrow = SpanCorruption(0.15, 3.0, seq_length=512, decoder_seq_length=20)
    noise, spans = narrow.counts(narrow.longest_text)
    assert (noise, spans) == (14, 5)
    assert narrow.longest_text == 521


def test_a_text_too_short_to_hide_anything_stays() -> None:
    for length in (0, 1):
        text, encoder, target = corrupted(PAPER, length, seed=0)
        assert encoder.tolist() == text.tolist()
        assert target.tolist() == [FIRST_SENTINEL]


def test_lengths_that_hold_no_span_are_named() -> None:
    with pytest.raises(ConfigError, match="--seq-length 1 is too short: T5 needs at least 2"):
        SpanCorruption(0.15, 3.0, seq_length=1, decoder_seq_length=64)
    with pytest.raises(ConfigError, match="--decoder-seq-length 2 is too short: .* at least 3"):
        SpanCorruption(0.15, 3.0, seq_length=64, decoder_seq_length=2)
