"""From the flags to the datasets of a run: what the builders of all models share.

1. The datasets of --data-path are opened, and their tokens are held against the vocabulary.
2. --split shares out the documents of each to training, validation and test.
3. A model's own `Maker` turns such a part into samples; those of several datasets are blended.
4. What was made, and what was left out, is reported.

What of this needs no index files, a `Rule` and the looks at a dataset, also serves `check`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron.blend import parse_blend
from megatron.config import Config
from megatron.data.blended_dataset import (
    BlendedDataset,
    build_blend_map,
    samples_needed,
    whole_weights,
)
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

    per_epoch: how many come of using each document once.
    """

    samples: SampleDataset
    per_epoch: float


@dataclass(frozen=True, kw_only=True)
class Remark:
    """What a report adds, such as documents that are left out: "" or from "; " on.

    share: of all documents or sentences those that it is about, 0 to 1.
    """

    text: str = ""
    share: float = 0.0


class Rule(Protocol):
    """What a kind of model wants of its data; nothing here writes index files."""

    def lacks(self, part: Part) -> str | None:
        """Why not one sample can be made of a part, as it ends a sentence; None where one can."""

    def remark(self, part: Part) -> Remark:
        """What is to be said of a part of which samples can be made."""


class Maker(Rule, Protocol):
    """How a kind of model makes samples of its data."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens that a dataset may hold."""

    def make(self, part: Part, samples: int) -> Made:
        """At least so many samples of a part that lacks nothing."""


def build_splits(
    config: Config,
    wanted: tuple[int, int, int],
    maker: Maker,
    *,
    report: Callable[[str], None],
) -> Splits:
    """The datasets of training, validation and test with so many samples; None where 0 are asked.

    report: takes one line for each part, with what was left out of it. A part for validation or
    test that is too small to hold a sample is reported and left out of the blend, and a split of
    such parts alone is None. Raises ConfigError or DataError where a file is missing or damaged, a
    token is outside the vocabulary, or a part for training holds no sample.
    """
    blend = parse_blend(config.data.data_path)
    if not blend:
        raise ConfigError("--data-path: expected the prefix of a dataset, found nothing")
    sources = []
    for weight, prefix in blend:
        source = Source.of(config, weight, IndexedDataset(prefix))
        check_tokens(source.dataset, maker.vocab_size, source.cache_dir)
        if config.data.mmap_warmup:
            source.dataset.warm_up()
        sources.append(source)
    train, valid, test = (
        _build_split(split, samples, sources, maker, config.data.split, report) if samples else None
        for split, samples in enumerate(wanted)
    )
    return train, valid, test


def cache_folder(config: Config, prefix: str) -> Path:
    """Where the index files of a dataset belong."""
    return Path(config.data.data_cache_dir or Path(prefix).parent / CACHE_FOLDER)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset of --data-path with its weight; parts: its share of each split."""

    weight: float
    dataset: IndexedDataset
    cache_dir: Path
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, config: Config, weight: float, dataset: IndexedDataset) -> "Source":
        """The dataset with the parts that --split makes of it; raises ConfigError."""
        cache_dir = cache_folder(config, dataset.prefix)
        splits = split_documents(config.data.split, len(dataset.documents) - 1)
        parts = tuple(
            Part(dataset=dataset, documents=documents, split=split, cache_dir=cache_dir)
            for split, documents in enumerate(splits)
        )
        return cls(weight=weight, dataset=dataset, cache_dir=cache_dir, parts=parts)


class _EmptyPartError(DataError):
    """A part of which no sample can be made."""


def _build_split(
    split: int,
    samples: int,
    sources: Sequence[Source],
    maker: Maker,
    shares: str,
    report: Callable[[str], None],
) -> SampleDataset | None:
    """The blend of all sources that have a sample for a split; None where none has."""
    weights = whole_weights([source.weight for source in sources])
    built: list[SampleDataset] = []
    kept: list[Source] = []
    lines: list[str] = []
    for source, weight, needed in zip(
        sources, weights, samples_needed(weights, samples), strict=True
    ):
        part = source.parts[split]
        share = f", {weight / sum(weights):.4g} of {part.dataset.prefix}"
        title = part.name + (share if len(sources) > 1 else "")
        try:
            made, line = _build_part(part, needed, maker, shares)
        except _EmptyPartError as empty:
            if split == TRAINING:
                raise
            report(f"{title}: skipped, since {empty}")
            continue
        built.append(made)
        kept.append(source)
        lines.append(f"{title}: {line}")
    if not kept:
        return None
    if len(kept) < len(sources):  # the others' shares have grown
        return _build_split(split, samples, kept, maker, shares, report)
    for line in lines:
        report(line)
    if len(built) == 1:
        return built[0]
    blend_map = build_blend_map(weights, samples=samples, cache_dir=sources[0].cache_dir)
    return BlendedDataset(built, blend_map, length=samples)


def _build_part(part: Part, wanted: int, maker: Maker, shares: str) -> tuple[SampleDataset, str]:
    """The samples of a part and their report; raises _EmptyPartError where there are none."""
    shortage = why_empty(part, maker, shares)
    if shortage is not None:
        raise _EmptyPartError(shortage)
    made = maker.make(part, wanted)
    line = (
        f"{len(part.documents):,} documents, {made.per_epoch:,.0f} samples an epoch, "
        f"{wanted / made.per_epoch:.2f} epochs{maker.remark(part).text}"
    )
    return made.samples, line


def why_empty(part: Part, rule: Rule, shares: str) -> str | None:
    """Why a part, which the weights `shares` have made, holds no sample; None where it does."""
    prefix = part.dataset.prefix
    if not part.documents:
        return (
            f"--split {shares!r} leaves no document for {part.name}: "
            f"{prefix} has {len(part.dataset.documents) - 1} documents"
        )
    lack = rule.lacks(part)
    if lack is None:
        return None
    return f"{prefix}: {len(part.documents)} documents for {part.name} hold no sample{lack}"
