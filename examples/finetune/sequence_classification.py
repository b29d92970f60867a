"""Classes, several labels, or a number for a text: what a review of an inn says.

    python examples/finetune/sequence_classification.py
    torchrun --nproc-per-node 2 examples/finetune/sequence_classification.py \\
        --tensor-model-parallel-size 2 --problem-type regression

`the food was great and the room was not good and the price was bad .` By --problem-type:

    single_label_classification   whether more things are praised than blamed
    multi_label_classification    which of food, service, room and price are praised
    regression                    the mean mark, from -2 to 2, where `not` turns a mark around
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.finetune.common import Batch, Counts, Example, Parser, correct, run
from examples.finetune.language import encode
from megatron.errors import run_command
from megatron.hf import ModelOutput

LENGTH = 24
THINGS = ("food", "service", "room", "price")
MARKS = {"awful": -2, "bad": -1, "good": 1, "great": 2}
SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
NAMES = {SINGLE: ("blamed", "praised"), MULTI: THINGS, REGRESSION: ("mark",)}
Sample = tuple[str, tuple[int, int, int, int]]  # a review, and each thing's mark or 0


def main() -> None:
    """Trains and reports."""
    parser = Parser(__doc__, steps=500)
    parser.add_argument("--problem-type", choices=NAMES, default=SINGLE)
    options = parser.parse_args()
    problem = options.problem_type
    config = {
        "problem_type": problem,
        "id2label": dict(enumerate(NAMES[problem])),
        "label2id": {name: number for number, name in enumerate(NAMES[problem])},
    }
    example = Example(
        "ForSequenceClassification",
        draw,
        partial(collate, problem=problem),
        partial(metrics, problem=problem),
        config,
    )
    run(example, options)


def draw(random: Random) -> Sample:
    """Opinions about three of the four things."""
    marks = [0] * len(THINGS)
    clauses = []
    for thing in random.sample(range(len(THINGS)), 3):
        word, turned = random.choice(list(MARKS)), random.random() < 0.3
        marks[thing] = -MARKS[word] if turned else MARKS[word]
        clauses.append(f"the {THINGS[thing]} was {'not ' if turned else ''}{word}")
    return " and ".join(clauses) + " .", (marks[0], marks[1], marks[2], marks[3])


def collate(samples: Sequence[Sample], problem: str) -> Batch:
    """Reviews, with the labels of the problem."""
    marks = torch.tensor([marks for _, marks in samples], dtype=torch.float32)  # [b, things]
    labels = {
        SINGLE: (marks.sign().sum(1) > 0).long(),
        MULTI: (marks > 0).float(),
        REGRESSION: marks.sum(1) / 3,
    }
    return encode([review for review, _ in samples], LENGTH) | {"labels": labels[problem]}


def metrics(output: ModelOutput, batch: Batch, problem: str) -> Counts:
    """How many labels are right, or how far the marks are off."""
    logits, labels = output["logits"], batch["labels"]
    if problem == SINGLE:
        return {"accuracy": correct(logits, labels)}
    if problem == MULTI:
        right = (logits > 0) == (labels > 0)
        return {
            "accuracy": (right.sum(), right.numel()),
            "all of a text right": (right.all(1).sum(), len(right)),
        }
    return {"mean error": ((logits.squeeze(1) - labels).abs().sum(), len(labels))}


if __name__ == "__main__":
    run_command(main)
