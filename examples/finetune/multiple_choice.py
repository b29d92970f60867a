"""The best of four endings of a text.

    python examples/finetune/multiple_choice.py
    torchrun --nproc-per-node 2 examples/finetune/multiple_choice.py --tensor-model-parallel-size 2

`the dog barks . it eats bones .` goes on with one of `it lives in the stable .`, `... hive .`,
`... kennel .` and `... pond .`
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.finetune.common import Batch, Counts, Example, Parser, correct, run
from examples.finetune.language import ANIMALS, any_order, encode, facts
from megatron.errors import run_command
from megatron.hf import ModelOutput

LENGTH, CHOICES = 24, 4
Sample = tuple[str, tuple[str, ...], int]  # the text, its endings, and which is right


def main() -> None:
    """Trains and reports."""
    example = Example("ForMultipleChoice", draw, collate, metrics)
    run(example, Parser(__doc__, steps=200).parse_args())


def draw(random: Random) -> Sample:
    """Two sentences about an animal, and the third with three wrong ones."""
    animals, order = random.sample(ANIMALS, CHOICES), any_order(random)
    right = random.randrange(CHOICES)
    told = [facts(animal, order, random) for animal in animals]
    return " ".join(told[right][:2]), tuple(ending for *_, ending in told), right


def collate(samples: Sequence[Sample]) -> Batch:
    """Every text with each of its endings, [b, choices, s]."""
    pairs = [(text, ending) for text, endings, _ in samples for ending in endings]
    texts, endings = zip(*pairs, strict=True)
    fields = encode(texts, LENGTH, endings)
    batch = {name: tensor.view(len(samples), CHOICES, LENGTH) for name, tensor in fields.items()}
    return batch | {"labels": torch.tensor([right for _, _, right in samples])}


def metrics(output: ModelOutput, batch: Batch) -> Counts:
    """How many choices are right."""
    return {"accuracy": correct(output["logits"], batch["labels"])}


if __name__ == "__main__":
    run_command(main)
