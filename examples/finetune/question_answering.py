"""Where in a text the answer to a question stands.

    python examples/finetune/question_answering.py
    torchrun --nproc-per-node 2 examples/finetune/question_answering.py \\
        --tensor-model-parallel-size 2

`where does it live ?` asks for `the old kennel` in `the dog eats fresh bones . it lives in the
old kennel . it barks .`: a span of one to three words.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.finetune.common import Batch, Counts, Example, Parser, run
from examples.finetune.language import ANIMALS, any_order, encode, facts
from megatron.errors import run_command
from megatron.hf import ModelOutput

LENGTH = 32
QUESTIONS = ("who is it ?", "what does it say ?", "what does it eat ?", "where does it live ?")
Sample = tuple[str, str, str]  # question, text, answer


def main() -> None:
    """Trains and reports."""
    example = Example("ForQuestionAnswering", draw, collate, metrics, {"num_labels": 2})
    run(example, Parser(__doc__, steps=500).parse_args())


def draw(random: Random) -> Sample:
    """A question about an animal and a text that answers it, among other things."""
    animal, kind = random.choice(ANIMALS), random.randrange(len(QUESTIONS))
    text = " ".join(facts(animal, any_order(random), random))
    who = text[: text.index(animal.name)] + animal.name
    food = text[text.index("eats ") + len("eats ") :].split(" .")[0]
    home = text[text.index("in ") + len("in ") :].split(" .")[0]
    return QUESTIONS[kind], text, (who, animal.sound, food, home)[kind]


def collate(samples: Sequence[Sample]) -> Batch:
    """Question and text; the labels are the places of the answer's first and last token."""
    questions, texts, _ = zip(*samples, strict=True)
    spans = torch.tensor([span(*sample) for sample in samples])  # [b, 2]
    batch = encode(questions, LENGTH, texts)
    return batch | {"start_positions": spans[:, 0], "end_positions": spans[:, 1]}


def span(question: str, text: str, answer: str) -> tuple[int, int]:
    """The places of the answer's first and last token behind `[CLS] question [SEP]`."""
    before = text[: f" {text} ".index(f" {answer} ")].split()
    first = 1 + len(question.split()) + 1 + len(before)
    return first, first + len(answer.split()) - 1


def metrics(output: ModelOutput, batch: Batch) -> Counts:
    """How many answers are found exactly."""
    starts = output["start_logits"].argmax(1) == batch["start_positions"]
    ends = output["end_logits"].argmax(1) == batch["end_positions"]
    return {"exact match": ((starts & ends).sum(), len(starts))}


if __name__ == "__main__":
    run_command(main)
