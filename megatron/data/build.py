"""From the flags to the datasets of a run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron.config import Config
from megatron.data.bert_dataset import BertDataset
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.masking import Masking
from megatron.data.sample_map import build_bert_map
from megatron.data.splits import NAMES, split_documents
from megatron.data.token_check import check_tokens
from megatron.errors import ConfigError, DataError
from megatron.tokenizer import Tokenizer

CACHE_FOLDER = "index-cache"
TRAINING = 0


def max_predictions(config: Config) -> int:
    """The most hidden tokens that a sample can have."""
    return max(1, round(config.data.mask_prob * config.data.seq_length))


def build_bert_datasets(
    config: Config,
    tokenizer: Tokenizer,
    samples: tuple[int, int, int],
    *,
    report: Callable[[str], None] = print,
) -> tuple[BertDataset | None, BertDataset | None, BertDataset | None]:
    """The datasets of training, validation and test with so many samples; None where 0 are asked.

    report: takes one line for each dataset, with what was left out of it. A validation or test
    split that is too small to hold a sample is reported and None. Raises ConfigError or DataError
    where a file is missing or damaged, a token is outside the vocabulary, or the training split
    holds no document that makes a sample.
    """
    if len(config.data.data_path) != 1:
        found = " ".join(config.data.data_path) or "nothing"
        raise ConfigError(f"--data-path: expected the prefix of one dataset, found {found}")
    prefix = config.data.data_path[0]
    dataset = IndexedDataset(prefix)
    cache_dir = Path(config.data.data_cache_dir or Path(prefix).parent / CACHE_FOLDER)
    check_tokens(dataset, tokenizer.vocab_size, cache_dir)
    if config.data.mmap_warmup:
        dataset.warm_up()
    builder = _Builder(config, tokenizer, dataset, cache_dir, report)
    ranges = split_documents(config.data.split, len(dataset.documents) - 1)
    train, valid, test = (
        builder.build(number, documents, wanted)
        for number, (documents, wanted) in enumerate(zip(ranges, samples, strict=True))
    )
    return train, valid, test


class _EmptySplitError(DataError):
    """A split of which no sample can be made."""


class _Builder:
    """Makes the datasets of the splits of one indexed dataset."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        dataset: IndexedDataset,
        cache_dir: Path,
        report: Callable[[str], None],
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._dataset = dataset
        self._cache_dir = cache_dir
        self._report = report
        self._binary_head = not config.model.bert_no_binary_head
        special = tokenizer.special_ids
        self._masking = Masking(
            mask_prob=config.data.mask_prob,
            most=max_predictions(config),
            mask=tokenizer.mask,
            ordinary=np.setdiff1d(np.arange(tokenizer.vocab_size), special),
            starts_word=tokenizer.starts_word,
        )

    def build(self, number: int, documents: range, samples: int) -> BertDataset | None:
        """The dataset of split `number`; None where none is asked for, or one is not to be had."""
        if samples == 0:
            return None
        try:
            return self._build(number, documents, samples)
        except _EmptySplitError as empty:
            if number == TRAINING:
                raise
            self._report(f"{NAMES[number]}: skipped, since {empty}")
            return None

    def _build(self, number: int, documents: range, samples: int) -> BertDataset:
        name = NAMES[number]
        data = self._config.data
        if not documents:
            raise _EmptySplitError(
                f"--split {data.split!r} leaves no document for {name}: "
                f"{self._dataset.prefix} has {len(self._dataset.documents) - 1} documents"
            )
        # [CLS] A [SEP] B [SEP], or [CLS] A [SEP].
        max_tokens = data.seq_length - (3 if self._binary_head else 2)
        if max_tokens < 2:
            raise ConfigError(f"--seq-length {data.seq_length} is too short: BERT needs at least 5")
        sample_map, per_epoch = build_bert_map(
            self._dataset,
            documents,
            samples=samples,
            max_tokens=max_tokens,
            min_sentences=2 if self._binary_head else 1,
            short_seq_prob=data.short_seq_prob,
            seed=self._config.train.seed,
            cache_dir=self._cache_dir,
        )
        skipped = self._describe_skipped(documents)
        if len(sample_map) == 0:
            raise _EmptySplitError(
                f"{self._dataset.prefix}: {len(documents)} documents for {name} hold no sample"
                f"{skipped}"
            )
        self._report(
            f"{name}: {len(documents):,} documents, {per_epoch:,} samples an epoch, "
            f"{samples / per_epoch:.2f} epochs{skipped}"
        )
        return BertDataset(
            self._dataset,
            sample_map,
            self._tokenizer,
            self._masking,
            length=samples,
            seq_length=data.seq_length,
            binary_head=self._binary_head,
            stream=(self._config.train.seed, number),
        )

    def _describe_skipped(self, documents: range) -> str:
        """What is said of the documents that cannot give a pair of segments; "" without any."""
        if not self._binary_head:
            return ""
        sentences = np.diff(self._dataset.documents[documents.start : documents.stop + 1])
        single = int((sentences == 1).sum())
        if single == 0:
            return ""
        return (
            f"; {single:,} of {len(documents):,} documents skipped because they hold a single "
            "sentence (made with --split-sentences? --bert-no-binary-head uses them)"
        )
