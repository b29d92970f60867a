"""The next word: a text about animals goes on with what is true of them.

    python examples/finetune/causal_lm.py
    torchrun --nproc-per-node 2 examples/finetune/causal_lm.py --tensor-model-parallel-size 2

`the dog lives in the old` can only go on with `kennel`. Much cannot be known, such as which animal
comes next, or whether a noun has an adjective: the loss is taken over all words, and what is
counted are foods and homes behind an adjective.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.finetune.common import Batch, Counts, Example, Parser, correct, run
from examples.finetune.language import ADJECTIVES, ANIMALS, draw_two, encode, numbers
from megatron.errors import run_command
from megatron.hf import ModelOutput

LENGTH = 42
ADJECTIVE = torch.tensor(numbers(ADJECTIVES))
KNOWN = torch.tensor(numbers([word for animal in ANIMALS for word in (animal.food, animal.home)]))


def main() -> None:
    """Trains and reports."""
    example = Example("ForCausalLM", draw, collate, metrics, {"is_decoder": True})
    run(example, Parser(__doc__, steps=400).parse_args())


def draw(random: Random) -> str:
    """Two animals, one after the other."""
    return " ".join(draw_two(random))


def collate(samples: Sequence[str]) -> Batch:
    """The labels are the texts themselves; the model moves them by one."""
    batch = encode(samples, LENGTH)
    return batch | {"labels": batch["input_ids"].where(batch["attention_mask"] == 1, -100)}


def metrics(output: ModelOutput, batch: Batch) -> Counts:
    """How many of the foods and homes are foreseen."""
    following, device = batch["labels"][:, 1:], batch["labels"].device
    known = torch.isin(following, KNOWN.to(device))
    known &= torch.isin(batch["input_ids"][:, :-1], ADJECTIVE.to(device))
    return {"accuracy": correct(output["logits"][:, :-1], following.where(known, -100))}


if __name__ == "__main__":
    run_command(main)
