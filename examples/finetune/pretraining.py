"""Both tasks of BERT's pretraining at once: masked tokens and the next sentence.

    python examples/finetune/pretraining.py
    torchrun --nproc-per-node 2 examples/finetune/pretraining.py --tensor-model-parallel-size 2

`the dog [MASK] . it eats bones .` and `it lives in the kennel .`: fill the gap, and say whether
the second text is about the same animal. The loss is the sum of both.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.finetune.common import Batch, Counts, Example, Parser, correct, run
from examples.finetune.language import draw_pair, encode, masked_labels, with_gaps
from megatron.errors import run_command
from megatron.hf import ModelOutput

LENGTH = 24
Sample = tuple[str, str, str, int]  # the first text, also with gaps, the second, and its label


def main() -> None:
    """Trains and reports."""
    run(Example("ForPreTraining", draw, collate, metrics), Parser(__doc__, steps=800).parse_args())


def draw(random: Random) -> Sample:
    """A pair of texts, of which the first has gaps."""
    first, second, label = draw_pair(random)
    return first, with_gaps([first], random)[0], second, label


def collate(samples: Sequence[Sample]) -> Batch:
    """Pairs of texts with both kinds of labels."""
    firsts, masked, seconds, labels = zip(*samples, strict=True)
    original = encode(firsts, LENGTH, seconds)
    batch = encode(masked, LENGTH, seconds)
    return batch | {
        "labels": masked_labels(original["input_ids"], batch["input_ids"]),
        "next_sentence_label": torch.tensor(labels),
    }


def metrics(output: ModelOutput, batch: Batch) -> Counts:
    """How many gaps are filled, and how many pairs judged, rightly."""
    return {
        "masked tokens": correct(output["prediction_logits"], batch["labels"]),
        "next sentence": correct(output["seq_relationship_logits"], batch["next_sentence_label"]),
    }


if __name__ == "__main__":
    run_command(main)
