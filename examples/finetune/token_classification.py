"""A tag for each word: names and parts of speech, where most words can be several.

    python examples/finetune/token_classification.py
    torchrun --nproc-per-node 2 examples/finetune/token_classification.py \\
        --tensor-model-parallel-size 2

`will will mark the can .` is NAME AUX VERB DET NOUN PUNCT: what a word is, its neighbours say.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.finetune.common import Batch, Counts, Example, Parser, correct, run
from examples.finetune.language import encode, pad
from megatron.errors import run_command
from megatron.hf import ModelOutput

LENGTH = 24
WORDS = {
    "NAME": ["anna", "tom", "will", "may", "rose", "mark", "bill"],
    "AUX": ["will", "may", "can", "must"],
    "VERB": ["mark", "bill", "can", "watch", "water", "saw", "drink", "smell", "clean", "empty"],
    "NOUN": ["can", "bill", "rose", "mark", "watch", "water", "saw", "drink", "smell"],
    "ADJ": ["clean", "new", "broken", "empty", "old", "red"],
    "DET": ["the"],
    "PUNCT": ["."],
}
TAGS = tuple(WORDS)
PARTIES = (("NAME",), ("DET", "NOUN"), ("DET", "ADJ", "NOUN"))
Sample = tuple[str, tuple[int, ...]]  # words, and the tag of each


def main() -> None:
    """Trains and reports."""
    config = {
        "id2label": dict(enumerate(TAGS)),
        "label2id": {tag: number for number, tag in enumerate(TAGS)},
    }
    example = Example("ForTokenClassification", draw, collate, metrics, config)
    run(example, Parser(__doc__, steps=300).parse_args())


def draw(random: Random) -> Sample:
    """One or two sentences: someone does something with something."""
    tags: list[str] = []
    for _ in range(random.randint(1, 2)):
        tags += [*random.choice(PARTIES), "AUX", "VERB", *random.choice(PARTIES), "PUNCT"]
    words = [random.choice(WORDS[tag]) for tag in tags]
    return " ".join(words), tuple(TAGS.index(tag) for tag in tags)


def collate(samples: Sequence[Sample]) -> Batch:
    """Texts and tags; [CLS], [SEP] and padding have none."""
    labels = pad([(-100, *tags) for _, tags in samples], -100, LENGTH)
    return encode([text for text, _ in samples], LENGTH) | {"labels": labels}


def metrics(output: ModelOutput, batch: Batch) -> Counts:
    """How many words are tagged rightly."""
    return {"accuracy": correct(output["logits"], batch["labels"])}


if __name__ == "__main__":
    run_command(main)
