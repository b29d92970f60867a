"""From the flags to the datasets of a run: what the builders of all models share.

1. The datasets of --data-path are opened, and their tokens are held against the vocabulary.
2. --split shares out the documents of each to training, validation and test.
3. A model's own `make` turns such a part into samples; those of several datasets are blended.
4. What was made, and what was left out, is reported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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

    samples: None where not even one can be made; per_epoch: how many come of using each document
    once; remark: what a report adds, such as documents that were left out, "" or from "; " on.
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
    each part, with what was left out of it. A part for validation or test that is too small to hold
    a sample is reported and left out of the blend, and a split of such parts alone is None. Raises
    ConfigError or DataError where a file is missing or damaged, a token is outside the vocabulary,
    or a part for training holds no sample.
    """
    blend = parse_blend(config.data.data_path)
    if not blend:
        raise ConfigError("--data-path: expected the prefix of a dataset, found nothing")
    sources = [_open_source(config, weight, prefix, vocab_size) for weight, prefix in blend]
    train, valid, test = (
        _build_split(split, samples, sources, make, config.data.split, report) if samples else None
        for split, samples in enumerate(wanted)
    )
    return train, valid, test


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A dataset of --data-path with its weight; splits: the documents of each split."""

    weight: float
    dataset: IndexedDataset
    splits: tuple[range, range, range]
    cache_dir: Path


def _open_source(config: Config, weight: float, prefix: str, vocab_size: int) -> _Source:
    """A dataset whose tokens were checked."""
    dataset = IndexedDataset(prefix)
    cache_dir = Path(config.data.data_cache_dir or Path(prefix).parent / CACHE_FOLDER)
    check_tokens(dataset, vocab_size, cache_dir)
    if config.data.mmap_warmup:
        dataset.warm_up()
    splits = split_documents(config.data.split, len(dataset.documents) - 1)
    return _Source(weight=weight, dataset=dataset, splits=splits, cache_dir=cache_dir)


class _EmptyPartError(DataError):
    """A part of which no sample can be made."""


def _build_split(
    split: int,
    samples: int,
    sources: Sequence[_Source],
    make: Make,
    shares: str,
    report: Callable[[str], None],
) -> SampleDataset | None:
    """The blend of all sources that have a sample for a split; None where none has."""
    weights = whole_weights([source.weight for source in sources])
    built: list[SampleDataset] = []
    kept: list[_Source] = []
    lines: list[str] = []
    for source, weight, needed in zip(
        sources, weights, samples_needed(weights, samples), strict=True
    ):
        part = Part(
            dataset=source.dataset,
            documents=source.splits[split],
            split=split,
            cache_dir=source.cache_dir,
        )
        share = f", {weight / sum(weights):.4g} of {part.dataset.prefix}"
        title = part.name + (share if len(sources) > 1 else "")
        try:
            made, line = _build_part(part, needed, make, shares)
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
        return _build_split(split, samples, kept, make, shares, report)
    for line in lines:
        report(line)
    if len(built) == 1:
        return built[0]
    blend_map = build_blend_map(weights, samples=samples, cache_dir=sources[0].cache_dir)
    return BlendedDataset(built, blend_map, length=samples)


def _build_part(part: Part, wanted: int, make: Make, shares: str) -> tuple[SampleDataset, str]:
    """The samples of a part and their report; raises _EmptyPartError where there are none."""
    prefix = part.dataset.prefix
    if not part.documents:
        raise _EmptyPartError(
            f"--split {shares!r} leaves no document for {part.name}: "
            f"{prefix} has {len(part.dataset.documents) - 1} documents"
        )
    made = make(part, wanted)
    if made.samples is None:
        raise _EmptyPartError(
            f"{prefix}: {len(part.documents)} documents for {part.name} hold no sample{made.remark}"
        )
    line = (
        f"{len(part.documents):,} documents, {made.per_epoch:,.0f} samples an epoch, "
        f"{wanted / made.per_epoch:.2f} epochs{made.remark}"
    )
    return made.samples, line
