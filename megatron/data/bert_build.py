"""From the flags to the datasets of BERT."""

from collections.abc import Callable

import numpy as np

from megatron.config import Config
from megatron.data.bert_dataset import BertDataset
from megatron.data.build import Made, Part, Remark, Splits, build_splits
from megatron.data.masking import Masking
from megatron.data.sample_map import build_sentence_map, holds_sentences
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
    return build_splits(config, samples, BertMaker(config, tokenizer), report=report)


class BertRule:
    """See `megatron.data.build.Rule`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._binary_head = not config.model.bert_no_binary_head
        self._min_sentences = 2 if self._binary_head else 1
        # [CLS] A [SEP] B [SEP], or [CLS] A [SEP].
        self._max_tokens = config.data.seq_length - (3 if self._binary_head else 2)
        if self._max_tokens < 2:
            raise ConfigError(
                f"--seq-length {config.data.seq_length} is too short: BERT needs at least 5"
            )

    def lacks(self, part: Part) -> str | None:
        """Without a document of two sentences there is no pair, without any sentence no text."""
        if holds_sentences(part.dataset, part.documents, self._min_sentences):
            return None
        return self.remark(part).text

    def remark(self, part: Part) -> Remark:
        """What is said of the documents that cannot give a pair of segments."""
        if not self._binary_head:
            return Remark()
        bounds = part.dataset.documents[part.documents.start : part.documents.stop + 1]
        single = int((np.diff(bounds) == 1).sum())
        if single == 0:
            return Remark()
        return Remark(
            text=f"; {single:,} of {len(part.documents):,} documents skipped because they hold a "
            "single sentence (made with --split-sentences? --bert-no-binary-head uses them)",
            share=single / len(part.documents),
        )


class BertMaker(BertRule):
    """See `megatron.data.build.Maker`."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(config)
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
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
            min_sentences=self._min_sentences,
            short_seq_prob=data.short_seq_prob,
            seed=seed,
            cache_dir=part.cache_dir,
        )
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
        return Made(samples=dataset, per_epoch=per_epoch)
