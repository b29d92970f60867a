"""SentencePiece models to test with."""

from pathlib import Path
from typing import Any

import pytest

LINES = [
    f"The {thing} number {i} was made by Dr. Smith in a day, and nobody knows why!"
    for i, thing in enumerate(["engine", "house", "garden", "river", "mountain"] * 20)
]


def train_model(directory: Path, **settings: Any) -> Path:
    """A model of 120 pieces, of the same text each time; skips where the package is missing."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = directory / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_writer=file,
            minloglevel=2,
            **{"vocab_size": 120, "model_type": "bpe", "hard_vocab_limit": False, **settings},
        )
    return path
