"""A corpus of a few hundred sentences of made-up words, and the flags to train on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.data import build_indexed_dataset, token_dtype

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = 59


@dataclass(frozen=True)
class Corpus:
    """Where the dataset and its vocabulary are."""

    prefix: Path
    vocab_file: Path

    def flags(self, **others: object) -> list[str]:
        """The flags of a run of ten seconds at most; `others` by field name, None leaves one out.

        A list gives several values and True a switch.
        """
        flags: dict[str, object] = {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "seq_length": 16,
            "max_position_embeddings": 16,
            "make_vocab_size_divisible_by": 8,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "train_iters": 12,
            "lr": 1e-2,
            "lr_warmup_fraction": 0.1,
            "eval_iters": 2,
            "eval_interval": 6,
            "log_interval": 1,
            "split": "80,10,10",
            "num_workers": 0,
            "use_cpu": True,
            "data_path": self.prefix,
            "vocab_file": self.vocab_file,
        }
        words = []
        for name, value in (flags | others).items():
            if value is not None:
                words.append("--" + name.replace("_", "-"))
                values = value if isinstance(value, list) else [value]
                words += [] if value is True else [str(each) for each in values]
        return words


def write_corpus(directory: Path, *, largest_token: int = len(SPECIAL) + WORDS - 1) -> Corpus:
    """Makes a corpus; `largest_token` beyond the vocabulary makes a damaged one."""
    random = np.random.Generator(np.random.Philox(7))
    vocabulary = [*SPECIAL, *(f"w{i}" for i in range(WORDS - 9)), *(f"##x{i}" for i in range(9))]
    vocab_file = directory / "vocab.txt"
    vocab_file.write_text("".join(f"{token}\n" for token in vocabulary))
    prefix = directory / "corpus_text_sentence"
    sentences = random.integers(1, 6, size=80)
    sizes = random.integers(2, 9, size=sentences.sum())
    # Some words are far more frequent than others, which is soon learned.
    tokens = len(SPECIAL) + (WORDS * random.random(sizes.sum()) ** 3).astype(np.int64)
    tokens[-1] = largest_token
    with build_indexed_dataset(prefix, token_dtype(len(vocabulary))) as builder:
        builder.add(tokens, sizes, sentences)
    return Corpus(prefix, vocab_file)
