"""The next sentence: whether a second text is about the animal of the first.

    python examples/finetune/next_sentence.py
    torchrun --nproc-per-node 2 examples/finetune/next_sentence.py --tensor-model-parallel-size 2

`the dog barks . it eats bones .` is followed by `it lives in the kennel .` (label 0), and not by
`it lives in the stable .` (label 1).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.finetune.common import Batch, Counts, Example, Parser, correct, run
from examples.finetune.language import draw_pair, encode
from megatron.errors import run_command
from megatron.hf import ModelOutput

LENGTH = 24
Sample = tuple[str, str, int]  # two texts, and 1 where the second does not follow


def main() -> None:
    """Trains and reports."""
    example = Example("ForNextSentencePrediction", draw_pair, collate, metrics)
    run(example, Parser(__doc__, steps=800).parse_args())


def collate(samples: Sequence[Sample]) -> Batch:
    """Pairs of texts."""
    firsts, seconds, labels = zip(*samples, strict=True)
    return encode(firsts, LENGTH, seconds) | {"labels": torch.tensor(labels)}


def metrics(output: ModelOutput, batch: Batch) -> Counts:
    """How many pairs are judged rightly."""
    return {"accuracy": correct(output["logits"], batch["labels"])}


if __name__ == "__main__":
    run_command(main)
