"""From the flags to the datasets of T5."""

from collections.abc import Callable

import numpy as np

from megatron.config import Config
from megatron.data.build import Made, Part, Remark, Splits, build_splits
from megatron.data.sample_map import build_sentence_map, holds_sentences
from megatron.data.spans import SpanCorruption
from megatron.data.t5_dataset import T5Dataset
from megatron.errors import ConfigError
from megatron.tokenizer import Tokenizer


def build_t5_datasets(
    config: Config,
    tokenizer: Tokenizer,
    samples: tuple[int, int, int],
    *,
    report: Callable[[str], None] = print,
) -> Splits:
    """The datasets of corrupted spans, of so many samples; see `build_splits`.

    Raises ConfigError where --vocab-extra-ids gives the tokenizer too few sentinels.
    """
    return build_splits(config, samples, T5Maker(config, tokenizer), report=report)


class T5Rule:
    """See `megatron.data.build.Rule`; `sentinels` of them are in the vocabulary."""

    def __init__(self, config: Config, sentinels: int) -> None:
        data = config.data
        self._config = config
        self._corruption = SpanCorruption(
            mask_prob=data.mask_prob,
            mean_span_length=data.mean_span_length,
            seq_length=data.seq_length,
            decoder_seq_length=data.decoder_length,
        )
        self._max_tokens = self._corruption.longest_text
        needed = self._corruption.sentinels_needed
        if sentinels < needed:
            raise ConfigError(
                f"--vocab-extra-ids {sentinels}: T5 needs at least {needed} for "
                f"--seq-length {data.seq_length}, --mask-prob {data.mask_prob:g} and "
                f"--mean-span-length {data.mean_span_length:g}"
            )

    def lacks(self, part: Part) -> str | None:
        """Without any sentence there is no text."""
        return None if holds_sentences(part.dataset, part.documents, 1) else ""

    def remark(self, part: Part) -> Remark:
        """What is said of sentences too long for a sample."""
        documents = part.dataset.documents
        first, end = documents[part.documents.start], documents[part.documents.stop]
        sizes = part.dataset.sizes[first:end]
        cut = int(np.count_nonzero(sizes > self._max_tokens))
        if cut == 0:
            return Remark()
        return Remark(
            text=f"; {cut:,} of {len(sizes):,} sentences are longer than the {self._max_tokens} "
            "tokens of a sample, which holds a part of them (made with --split-sentences?)",
            share=cut / len(sizes),
        )


class T5Maker(T5Rule):
    """See `megatron.data.build.Maker`."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(config, len(tokenizer.sentinels))
        self._tokenizer = tokenizer
        # Of text alone: a sentinel in the corpus could not be told from one that marks a span.
        self.vocab_size = tokenizer.vocab_size - len(tokenizer.sentinels)

    def make(self, part: Part, samples: int) -> Made:
        """So many samples of a part."""
        data, seed = self._config.data, self._config.train.seed
        sample_map, per_epoch = build_sentence_map(
            part.dataset,
            part.documents,
            samples=samples,
            max_tokens=self._max_tokens,
            min_sentences=1,
            short_seq_prob=data.short_seq_prob,
            seed=seed,
            cache_dir=part.cache_dir,
        )
        dataset = T5Dataset(
            part.dataset,
            sample_map,
            self._tokenizer,
            self._corruption,
            length=samples,
            stream=(seed, part.split),
        )
        return Made(samples=dataset, per_epoch=per_epoch)
