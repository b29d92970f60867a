"""From the flags to the datasets of a run: what the builders of all models share.

1. The dataset of --data-path is opened, and its tokens are held against the vocabulary.
2. --split shares out its documents to training, validation and test.
3. A model's own `make` turns the documents of each split into samples.
4. What was made, and what was left out, is reported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.config import Config
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.samples import SampleDataset
from megatron.data.splits import NAMES, split_documents
from megatron.data.token_check import check_tokens
from megatron.errors import ConfigError, DataError

CACHE_FOLDER = "index-cache"
TRAINING = 0

Splits = tuple[SampleDataset | None, SampleDataset | None, SampleDataset | None]


@dataclass(frozen=True, kw_only=True)
class Part:
    """The documents of one dataset that go to one split.

    split: its number, of `splits.NAMES`; cache_dir: where index files belong.
    """

    dataset: IndexedDataset
    documents: range
    split: int
    cache_dir: Path

    @property
    def name(self) -> str:
        """The name of the split."""
        return NAMES[self.split]


@dataclass(frozen=True, kw_only=True)
class Made:
    """The samples that were made of a part.

    samples: None where not even one can be made; per_epoch: how many come of using each document
    once; remark: what a report says of documents that were left out, "" or from "; " on.
    """

    samples: SampleDataset | None
    per_epoch: float
    remark: str = ""


Make = Callable[[Part, int], Made]


def build_splits(
    config: Config,
    wanted: tuple[int, int, int],
    make: Make,
    *,
    vocab_size: int,
    report: Callable[[str], None],
) -> Splits:
    """The datasets of training, validation and test with so many samples; None where 0 are asked.

    make: the samples of a part, at least as many as its second argument. report: takes one line for
    each dataset, with what was left out of it. A validation or test split that is too small to hold
    a sample is reported and None. Raises ConfigError or DataError where a file is missing or
    damaged, a token is outside the vocabulary, or the training split holds no sample.
    """
    if len(config.data.data_path) != 1:
        found = " ".join(config.data.data_path) or "nothing"
        raise ConfigError(f"--data-path: expected the prefix of one dataset, found {found}")
    prefix = config.data.data_path[0]
    dataset = IndexedDataset(prefix)
    cache_dir = Path(config.data.data_cache_dir or Path(prefix).parent / CACHE_FOLDER)
    check_tokens(dataset, vocab_size, cache_dir)
    if config.data.mmap_warmup:
        dataset.warm_up()
    ranges = split_documents(config.data.split, len(dataset.documents) - 1)

    def build(split: int) -> SampleDataset | None:
        if wanted[split] == 0:
            return None
        part = Part(dataset=dataset, documents=ranges[split], split=split, cache_dir=cache_dir)
        try:
            return _build_part(part, wanted[split], make, config.data.split, report)
        except _EmptySplitError as empty:
            if split == TRAINING:
                raise
            report(f"{part.name}: skipped, since {empty}")
            return None

    return build(0), build(1), build(2)


class _EmptySplitError(DataError):
    """A split of which no sample can be made."""


def _build_part(
    part: Part, wanted: int, make: Make, split: str, report: Callable[[str], None]
) -> SampleDataset:
    """The samples of a part, reported; raises _EmptySplitError where there are none."""
    prefix = part.dataset.prefix
    if not part.documents:
        raise _EmptySplitError(
            f"--split {split!r} leaves no document for {part.name}: "
            f"{prefix} has {len(part.dataset.documents) - 1} documents"
        )
    made = make(part, wanted)
    if made.samples is None:
        raise _EmptySplitError(
            f"{prefix}: {len(part.documents)} documents for {part.name} hold no sample{made.remark}"
        )
    report(
        f"{part.name}: {len(part.documents):,} documents, {made.per_epoch:,.0f} samples an epoch, "
        f"{wanted / made.per_epoch:.2f} epochs{made.remark}"
    )
    return made.samples
