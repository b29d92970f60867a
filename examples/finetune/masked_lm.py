"""Masked tokens: what an animal says, eats and lives in, from the words around the gap.

    python examples/finetune/masked_lm.py
    torchrun --nproc-per-node 2 examples/finetune/masked_lm.py --tensor-model-parallel-size 2

`the dog [MASK] . it eats bones . it lives in the [MASK] .` Each gap can be filled from what is
left, by someone who knows the sixteen animals.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.finetune.common import Batch, Counts, Example, Parser, correct, run
from examples.finetune.language import draw_two, encode, masked_labels, with_gaps
from megatron.errors import run_command
from megatron.hf import ModelOutput

LENGTH = 42
Sample = tuple[str, str]  # a text, and the same with gaps


def main() -> None:
    """Trains and reports."""
    run(Example("ForMaskedLM", draw, collate, metrics), Parser(__doc__, steps=400).parse_args())


def draw(random: Random) -> Sample:
    """Two animals, one after the other."""
    texts = draw_two(random)
    return " ".join(texts), " ".join(with_gaps(texts, random))


def collate(samples: Sequence[Sample]) -> Batch:
    """Texts with gaps; the labels are the words in them."""
    original = encode([text for text, _ in samples], LENGTH)
    batch = encode([masked for _, masked in samples], LENGTH)
    return batch | {"labels": masked_labels(original["input_ids"], batch["input_ids"])}


def metrics(output: ModelOutput, batch: Batch) -> Counts:
    """How many gaps are filled rightly."""
    return {"accuracy": correct(output["logits"], batch["labels"])}


if __name__ == "__main__":
    run_command(main)
