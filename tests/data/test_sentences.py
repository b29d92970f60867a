"""The sentence splitter on the cases that rules get wrong, and its invariants on any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.sentences import split_sentences
from tests.data.support import EXAMPLES

# "|" stands where a sentence ends.
CASES = [
    "One sentence.| Another one!| A third?| Yes.",
    "No final stop",
    "Dr. Smith met Mrs. Jones.| They talked.",
    "See Fig. 3 and Eq. 12 of the paper.| It is short.",
    "I said no.| Then I left.",
    "Made by J. S. Bach in 1720.| It is great.",
    "So do I.| They agree.",
    "I. M. Pei designed it.| It stands.",
    "It costs 3.50 dollars.| That is 1.5 times more.",
    "Version 2.0.1 is out.| Get it.",
    "Some tools, e.g. Make and i.e. Ninja, build.| Others don't.",
    "Use foo, bar, etc. when needed.| Done.",
    "Use foo, bar, etc.| When done, stop.",
    "cf. Knuth et al. (1997) for more.| Read it.",
    'He said "Stop."| She stopped.',
    'He said "Stop!" and she stopped.| Good.',
    "(It is in brackets.)| It is not.",
    "Wait... what?| Nothing.",
    "He waited...| Then he left.",
    "What?!| Really.",
    "Read foo.txt and os.path.| Then stop.",
    "1. First things first.| 2. Then the rest.",
    "In Jan. 2020 it rained.| In Feb. it snowed.",
    "A heading\n\n|A paragraph.",
    "Ends with a stop.\n\n|a lower case paragraph.",
    "Wrapped\nlines go on.| Next\none.",
    "“Quoted.”| ‘So.’| «Là.»| Fin.",
    "これは文です。|これも文です。|",
    "Über uns.| Älter wird man immer.",
    "Look it up (see p. 12) there.| Good.",
]


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str) -> None:
    expected = [part.strip() for part in case.split("|") if part.strip()]
    assert split_sentences(case.replace("|", "")) == expected


@given(st.text(st.sampled_from(list("aB.!? \n\t\"')(1。…")) | st.characters(), max_size=60))
@EXAMPLES
def test_nothing_is_lost(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join("".join(s.split()) for s in sentences) == "".join(text.split())
    assert all(sentence == sentence.strip() != "" for sentence in sentences)


@given(st.text(st.sampled_from(list("aB.!? \n\t\"')(1。…")) | st.characters(), max_size=60))
@EXAMPLES
def test_keeping_newlines_keeps_all_space_between_sentences(text: str) -> None:
    kept = split_sentences(text, keep_newlines=True)
    assert [sentence.strip() for sentence in kept] == split_sentences(text)
    assert "".join(kept).strip() == text.strip()


def test_keeping_newlines() -> None:
    text = "  One.\nTwo.\n\nThree. \n"
    assert split_sentences(text, keep_newlines=True) == ["One.\n", "Two.\n\n", "Three. \n"]
    assert split_sentences(text) == ["One.", "Two.", "Three."]


def test_long_texts_take_linear_time() -> None:
    assert len(split_sentences("Dr. X is here. " * 20_000)) == 20_000
    assert len(split_sentences("." * 200_000)) == 1
    assert len(split_sentences("word " * 100_000)) == 1
    assert len(split_sentences("x." + '"' * 200_000)) == 1
    assert len(split_sentences("1. " * 100_000)) > 1
    assert split_sentences("\n" * 200_000) == []
