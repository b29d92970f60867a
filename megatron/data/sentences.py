"""Cuts English and similar text into sentences, without models or word lists to download.

A sentence ends at ".", "!", "?" or "…" (with closing quotes and brackets behind it) before a space,
or at their full-width forms, and always at an empty line. A full stop does not end one

- before a word in lower case:                "the file foo. txt", "etc. and so on"
- after an abbreviation that a name or number follows:  "Dr. Smith", "cf. Knuth", "Fig. 3"
- after initials and other single letters:    "J. S. Bach", but "and so do I. They"
- after the number of a list item:            "1. First"

and "..." ends one only before a capital letter.
"""

import re
from collections.abc import Iterator

# Abbreviations that something belonging to them always follows.
_TITLES = (
    "mr mrs ms messrs dr prof rev hon gov gen col capt lt sgt sen rep st mt ft fr sr pres supt "
    "e.g i.e cf viz vs v eg ie approx ca al resp incl excl esp aka a.k.a"
)
# Abbreviations only before a number: "Fig. 3", "No. 5", "Jan. 7", "pp. 12".
_NUMBERED = (
    "fig figs eq eqs no nos nr vol vols ch chap sec sect pt art p pp ver rev ed tab ex app par "
    "jan feb mar apr jun jul aug sep sept oct nov dec"
)

_ABBREVIATIONS = frozenset(_TITLES.split())
_BEFORE_NUMBERS = frozenset(_NUMBERED.split())

_CLOSING = "\"'”’»)\\]}*_`"
_OPENING = "\"'“‘«(\\[{*_`¿¡"
_END = re.compile(
    # A run of stops is looked at once, from its beginning, and never in part.
    rf"(?<![.!?…])(?P<stop>[.!?…]++)[{_CLOSING}]*+(?P<gap>\s++)(?=(?P<next>[{_OPENING}]*+\S))"
    r"|(?P<wide>[。！？][”’」』）]*)\s*"
    r"|(?P<blank>\n[ \t]*\n\s*)"
)
_LAST_WORD = re.compile(rf"(?:^|[\s{_OPENING}—–/-])([^\s{_OPENING}—–/-]*)$")


def split_sentences(text: str, *, keep_newlines: bool = False) -> list[str]:
    """The sentences of a text, without the space around them; none is empty.

    keep_newlines: leave the white space that follows a sentence at its end.
    """
    sentences = []
    start = 0
    for end in [*_ends(text), len(text)]:
        sentence = text[start:end]
        start = end
        if sentence.strip():
            sentences.append(sentence.lstrip() if keep_newlines else sentence.strip())
    return sentences


def _ends(text: str) -> Iterator[int]:
    """Where sentences end, behind the white space that follows them."""
    start = 0
    for match in _END.finditer(text):
        if match["stop"] is None or _ends_sentence(text, start, match):
            yield match.end()
            start = match.end()


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether the stop at `match` ends the sentence that began at `start`."""
    if re.search(r"\n[ \t]*\n", match["gap"]):
        return True
    following = match["next"][-1]
    if following.islower():
        return False
    if match["stop"] != ".":
        return following.isupper() or match["stop"] not in ("...", "…")
    behind = text[max(start, match.start() - 40) : match.start()]
    found = _LAST_WORD.search(behind)
    word = found[1] if found else ""
    if word.lower() in _ABBREVIATIONS:
        return False
    if word.lower() in _BEFORE_NUMBERS:
        return not following.isdigit()
    if len(word) == 1 and word.isalpha():
        return word == "I" and not _is_initial(text, match.end())
    is_item = word.isdigit() or re.fullmatch(r"[ivxIVX]+", word)
    return not (is_item and not text[start : match.start() - len(word)].strip())


def _is_initial(text: str, at: int) -> bool:
    """Whether a single letter with a full stop stands at `at`, as in "I. M. Pei"."""
    return bool(re.match(r"[A-Z]\.\s", text[at : at + 3]))
