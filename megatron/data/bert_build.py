"""From the flags to the datasets of BERT."""

from collections.abc import Callable

import numpy as np

from megatron.config import Config
from megatron.data.bert_dataset import BertDataset
from megatron.data.build import Made, Part, Splits, build_splits
from megatron.data.masking import Masking
from megatron.data.sample_map import build_sentence_map
from megatron.errors import ConfigError
from megatron.tokenizer import Tokenizer


def max_predictions(config: Config) -> int:
    """The most hidden tokens that a sample can have."""
    return max(1, round(config.data.mask_prob * config.data.seq_length))


def build_bert_datasets(
    config: Config,
    tokenizer: Tokenizer,
    samples: tuple[int, int, int],
    *,
    report: Callable[[str], None] = print,
) -> Splits:
    """The datasets of masked sentence pairs, of so many samples; see `build_splits`."""
    builder = _Builder(config, tokenizer)
    return build_splits(
        config, samples, builder.make, vocab_size=tokenizer.vocab_size, report=report
    )


class _Builder:
    """Makes the samples of a part of an indexed dataset."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._binary_head = not config.model.bert_no_binary_head
        # [CLS] A [SEP] B [SEP], or [CLS] A [SEP].
        self._max_tokens = config.data.seq_length - (3 if self._binary_head else 2)
        if self._max_tokens < 2:
            raise ConfigError(
                f"--seq-length {config.data.seq_length} is too short: BERT needs at least 5"
            )
        special = tokenizer.special_ids
        self._masking = Masking(
            mask_prob=config.data.mask_prob,
            most=max_predictions(config),
            mask=tokenizer.mask,
            ordinary=np.setdiff1d(np.arange(tokenizer.vocab_size), special),
            starts_word=tokenizer.starts_word,
        )

    def make(self, part: Part, samples: int) -> Made:
        """So many samples of a part."""
        data, seed = self._config.data, self._config.train.seed
        sample_map, per_epoch = build_sentence_map(
            part.dataset,
            part.documents,
            samples=samples,
            max_tokens=self._max_tokens,
            min_sentences=2 if self._binary_head else 1,
            short_seq_prob=data.short_seq_prob,
            seed=seed,
            cache_dir=part.cache_dir,
        )
        remark = self._describe_skipped(part)
        if len(sample_map) == 0:
            return Made(samples=None, per_epoch=0, remark=remark)
        dataset = BertDataset(
            part.dataset,
            sample_map,
            self._tokenizer,
            self._masking,
            length=samples,
            seq_length=data.seq_length,
            binary_head=self._binary_head,
            stream=(seed, part.split),
        )
        return Made(samples=dataset, per_epoch=per_epoch, remark=remark)

    def _describe_skipped(self, part: Part) -> str:
        """What is said of the documents that cannot give a pair of segments; "" without any."""
        if not self._binary_head:
            return ""
        bounds = part.dataset.documents[part.documents.start : part.documents.stop + 1]
        single = int((np.diff(bounds) == 1).sum())
        if single == 0:
            return ""
        return (
            f"; {single:,} of {len(part.documents):,} documents skipped because they hold a single "
            "sentence (made with --split-sentences? --bert-no-binary-head uses them)"
        )
