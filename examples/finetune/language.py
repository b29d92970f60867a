"""A small language with things to learn in it, made of a seed: no files and no downloads.

Sixteen animals make sounds, eat, and live somewhere; `facts` says so in sentences. Words get
the numbers of their places in `VOCABULARY`, and a text or a pair of texts becomes what BERT reads:
`[CLS] first text [SEP]` or `[CLS] first text [SEP] second text [SEP]`, padded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

PAD, CLS, SEP, MASK = "[PAD]", "[CLS]", "[SEP]", "[MASK]"
ADJECTIVES = ("small", "old", "red", "good", "fresh")

_ANIMALS = """
    bee hums nectar hive, cat meows fish basket, cow moos clover barn, crow caws cherries oak,
    dog barks bones kennel, duck quacks weed pond, frog croaks flies marsh, hen clucks corn coop,
    horse neighs oats stable, lion roars zebras savanna, mouse squeaks cheese hole,
    owl hoots voles tower, pig grunts acorns sty, sheep bleats grass fold,
    snake hisses eggs burrow, wolf howls deer forest
"""
_OTHER_WORDS = """
    the it lives in eats what where does live eat say who do is . ?
    bad awful great not food service room price was and
    anna tom will may rose mark bill can must watch water saw drink smell clean new broken empty
"""


class Animal(NamedTuple):
    """An animal and what is true of it."""

    name: str
    sound: str
    food: str
    home: str


ANIMALS = [Animal(*words.split()) for words in _ANIMALS.split(",")]
_WORDS = {*itertools.chain(*ANIMALS), *ADJECTIVES, *_OTHER_WORDS.split()}
VOCABULARY = [PAD, CLS, SEP, MASK, *sorted(_WORDS)]
_NUMBERS = {word: number for number, word in enumerate(VOCABULARY)}


def facts(animal: Animal, order: Sequence[int], random: Random) -> list[str]:
    """Three sentences, of which the first names the animal, with adjectives here and there.

    order: in which its sound (0), food (1) and home (2) are told.
    """
    predicates = [
        animal.sound,
        f"eats {_described(animal.food, random)}",
        f"lives in the {_described(animal.home, random)}",
    ]
    subjects = [f"the {_described(animal.name, random)}", "it", "it"]
    return [f"{who} {predicates[kind]} ." for who, kind in zip(subjects, order, strict=True)]


def _described(noun: str, random: Random) -> str:
    return random.choice(["", *(f"{adjective} " for adjective in ADJECTIVES)]) + noun


def any_order(random: Random) -> list[int]:
    """One for `facts`."""
    return random.sample(range(3), 3)


def draw_two(random: Random) -> list[str]:
    """All about one animal, and all about another."""
    animals = random.sample(ANIMALS, 2)
    return [" ".join(facts(animal, any_order(random), random)) for animal in animals]


def draw_pair(random: Random) -> tuple[str, str, int]:
    """Two texts, and 0 where the second is about the first one's animal, 1 where it is not."""
    animal, other = random.sample(ANIMALS, 2)
    order, label = any_order(random), random.randint(0, 1)
    first, second = animal, (animal, other)[label]
    return " ".join(facts(first, order, random)[:2]), facts(second, order, random)[2], label


def with_gaps(texts: Sequence[str], random: Random) -> list[str]:
    """Each text with one or two of its words about an animal masked."""
    told = set(itertools.chain(*ANIMALS))
    gapped = []
    for text in texts:
        words = text.split()
        places = [place for place, word in enumerate(words) if word in told]
        for place in random.sample(places, random.randint(1, 2)):
            words[place] = MASK
        gapped.append(" ".join(words))
    return gapped


def masked_labels(original: Tensor, masked: Tensor) -> Tensor:
    """The words in the gaps, and -100 elsewhere, i64[texts, length]."""
    return original.where(masked == _NUMBERS[MASK], -100)


def numbers(words: Sequence[str]) -> list[int]:
    """The words' places in the vocabulary."""
    return [_NUMBERS[word] for word in words]


def pad(rows: Sequence[Sequence[int]], filling: int, length: int) -> Tensor:
    """i64[rows, length]"""
    return torch.tensor([[*row, *[filling] * (length - len(row))] for row in rows])


def encode(
    firsts: Sequence[str], length: int, seconds: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The arguments of `forward` for texts, or for pairs of them.

    Returns:
        input_ids, token_type_ids and attention_mask, i64[texts, length] each.
    """
    starts = [[CLS, *first.split(), SEP] for first in firsts]
    ends = [[]] * len(starts) if seconds is None else [[*each.split(), SEP] for each in seconds]
    pairs = list(zip(starts, ends, strict=True))
    return {
        "input_ids": pad([numbers(start + end) for start, end in pairs], 0, length),
        "token_type_ids": pad(
            [[0] * len(start) + [1] * len(end) for start, end in pairs], 0, length
        ),
        "attention_mask": pad([[1] * len(start + end) for start, end in pairs], 0, length),
    }
