"""Small datasets and a small vocabulary to test with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings

from megatron.config import Config
from megatron.data import IndexedDataset, build_indexed_dataset
from megatron.tokenizer import Tokenizer, load_wordpiece
from tests.configs import small

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(60)]
PIECES = [f"##p{i}" for i in range(35)]
VOCABULARY = SPECIAL + WORDS + PIECES  # 100 tokens; the words 5 to 64, the pieces 65 to 99

# The same examples each time, however slow the machine; a directory may serve several.
EXAMPLES = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

Documents = Sequence[Sequence[Sequence[int]]]  # tokens of sentences of documents


def write_vocabulary(directory: Path) -> Path:
    """The vocabulary as a vocab.txt."""
    path = directory / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    return path


def tokenizer(directory: Path) -> Tokenizer:
    """A tokenizer of the vocabulary."""
    return load_wordpiece(write_vocabulary(directory), lower_case=True)


def write_dataset(prefix: Path, documents: Documents, dtype: str = "u2") -> IndexedDataset:
    """The documents as an indexed dataset."""
    with build_indexed_dataset(prefix, dtype) as builder:
        for document in documents:
            tokens = [token for sentence in document for token in sentence]
            builder.add(tokens, [len(sentence) for sentence in document], [len(document)])
    return IndexedDataset(prefix)


def random_documents(count: int, seed: int, sentences: tuple[int, int] = (2, 9)) -> Documents:
    """Documents of words, of which some have several pieces."""
    random = np.random.default_rng(seed)
    return [[_sentence(random) for _ in range(random.integers(*sentences))] for _ in range(count)]


def _sentence(random: np.random.Generator) -> list[int]:
    tokens: list[int] = []
    for _ in range(random.integers(3, 15)):
        tokens.append(int(random.integers(5, 65)))
        tokens += random.integers(65, 100, random.integers(0, 3)).tolist()
    return tokens


def data_config(prefix: Path, directory: Path, **changes: Any) -> Config:
    """A small configuration that reads a dataset and keeps its index files in a directory."""
    flags: dict[str, Any] = {"data_cache_dir": str(directory / "cache"), **changes}
    return small(**{"data_path": (str(prefix),), **flags})
