"""Properties of whole-word masking."""

import dataclasses

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.masking import Masking
from tests.data.support import EXAMPLES

MASK, CLS, SEP = 4, 2, 3
STARTS_WORD = np.arange(100) < 65  # as in tests.data.support
MASKING = Masking(
    mask_prob=0.15, most=19, mask=MASK, ordinary=np.arange(5, 100), starts_word=STARTS_WORD
)


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def sample(seed: int, tokens: int = 125) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """[CLS] A [SEP] B [SEP] of random words, and where the special tokens stand."""
    random = generator(seed)
    body = np.where(
        random.random(tokens) < 0.6,
        random.integers(5, 65, tokens),
        random.integers(65, 100, tokens),
    )
    half = tokens // 2
    ids = np.concatenate([[CLS], body[:half], [SEP], body[half:], [SEP]])
    fixed = np.zeros(len(ids), np.bool_)
    fixed[[0, half + 1, len(ids) - 1]] = True
    return ids, fixed


@given(seed=st.integers(0, 2**32), tokens=st.integers(2, 200), mask_prob=st.floats(0.01, 0.99))
@EXAMPLES
def test_only_whole_words_are_chosen(seed: int, tokens: int, mask_prob: float) -> None:
    masking = dataclasses.replace(MASKING, mask_prob=mask_prob, most=60)
    ids, fixed = sample(seed, tokens)
    hidden, positions = masking.apply(ids, fixed, generator(seed))
    assert np.array_equal(positions, np.unique(positions))
    assert len(positions) <= min(60, max(1, round(mask_prob * len(ids))))
    assert not fixed[positions].any()
    untouched = np.setdiff1d(np.arange(len(ids)), positions)
    assert np.array_equal(hidden[untouched], ids[untouched])
    chosen = np.isin(np.arange(len(ids)), positions)
    for i in range(1, len(ids)):
        if not fixed[i] and not STARTS_WORD[ids[i]] and not fixed[i - 1]:
            assert chosen[i] == chosen[i - 1], "a word is split"


def test_a_rest_of_a_word_does_not_join_the_segment_before() -> None:
    ids = np.array([CLS, 5, SEP, 70, 6, SEP])
    fixed = np.isin(np.arange(6), [0, 2, 5])
    chosen = {tuple(MASKING.apply(ids, fixed, generator(seed))[1].tolist()) for seed in range(60)}
    assert chosen == {(1,), (3,), (4,)}


def test_shares_are_those_of_bert() -> None:
    tokens = masked = kept = replaced = 0
    others = []
    for seed in range(3000):
        ids, fixed = sample(seed)
        hidden, positions = MASKING.apply(ids, fixed, generator(seed))
        tokens += len(ids)
        now, before = hidden[positions], ids[positions]
        masked += int((now == MASK).sum())
        kept += int((now == before).sum())
        replaced += int(((now != MASK) & (now != before)).sum())
        others += now[(now != MASK) & (now != before)].tolist()
    total = masked + kept + replaced
    assert abs(total / tokens - 0.15) < 0.002
    assert abs(masked / total - 0.8) < 0.01
    assert abs(kept / total - 0.1) < 0.01
    assert abs(replaced / total - 0.1) < 0.01
    # The others are drawn evenly from all tokens but the special ones.
    counts = np.bincount(others, minlength=100)
    assert counts[:5].sum() == 0
    assert counts[5:].min() > 0.5 * counts[5:].mean()


def test_every_word_is_as_likely_as_any_other() -> None:
    ids, fixed = sample(0)
    counts = np.zeros(len(ids))
    for seed in range(4000):
        counts[MASKING.apply(ids, fixed, generator(seed))[1]] += 1
    singles = [
        i
        for i in range(1, len(ids) - 1)
        if not fixed[i] and STARTS_WORD[ids[i]] and (fixed[i + 1] or STARTS_WORD[ids[i + 1]])
    ]
    share = counts[singles] / 4000
    assert share.std() < 3 * np.sqrt(0.15 * 0.85 / 4000)
