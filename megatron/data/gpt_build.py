"""From the flags to the datasets of GPT."""

from collections.abc import Callable

import numpy as np

from megatron.config import Config
from megatron.data.build import Made, Part, Remark, Splits, build_splits
from megatron.data.gpt_dataset import DocumentEnds, GPTDataset
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.sample_map import build_token_map
from megatron.errors import ConfigError
from megatron.tokenizer import Tokenizer

LOOKED_AT = 100  # documents, to find out whether they have an end-of-document token


def build_gpt_datasets(
    config: Config,
    tokenizer: Tokenizer,
    samples: tuple[int, int, int],
    *,
    report: Callable[[str], None] = print,
) -> Splits:
    """The datasets of stretches of text, of so many samples; see `build_splits`.

    Raises ConfigError where a flag is about a token that the tokenizer does not have.
    """
    return build_splits(config, samples, GPTMaker(config, tokenizer), report=report)


def _flags(config: Config) -> str:
    """Those flags given that are about the ends of documents."""
    names = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
    given = [name for name in names if getattr(config.data, name)]
    return ", ".join("--" + name.replace("_", "-") for name in given)


def _document_ends(config: Config, tokenizer: Tokenizer) -> DocumentEnds | None:
    """What is done at the ends of documents; None where nothing is."""
    flags = _flags(config)
    if not flags:
        return None
    if tokenizer.eod is None:
        raise ConfigError(
            f"{flags}: --tokenizer-type {tokenizer.type} has no token that ends a document"
        )
    return DocumentEnds(
        eod=tokenizer.eod,
        mask_loss=config.data.eod_mask_loss,
        reset_position_ids=config.data.reset_position_ids,
        reset_attention_mask=config.data.reset_attention_mask,
    )


class GPTRule:
    """See `megatron.data.build.Rule`; without a tokenizer, ends of documents are not looked at."""

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None) -> None:
        self._config = config
        self._ends = None if tokenizer is None else _document_ends(config, tokenizer)

    def lacks(self, part: Part) -> str | None:
        """A sample takes one token more than the sequence has."""
        seq_length = self._config.data.seq_length
        tokens = part.dataset.count_tokens(part.documents, enough=seq_length + 1)
        if tokens > seq_length:
            return None
        return f": {tokens} tokens, --seq-length {seq_length} needs {seq_length + 1}"

    def remark(self, part: Part) -> Remark:
        """What is said where flags about the ends of documents find none."""
        if self._ends is None or _has_ends(part.dataset, part.documents, self._ends.eod):
            return Remark()
        return Remark(
            text=f"; documents do not end with token {self._ends.eod}, so that "
            f"{_flags(self._config)} has no effect (made with --append-eod?)",
            share=1.0,
        )


class GPTMaker(GPTRule):
    """See `megatron.data.build.Maker`."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.vocab_size = tokenizer.vocab_size

    def make(self, part: Part, samples: int) -> Made:
        """So many samples of a part."""
        seq_length = self._config.data.seq_length
        tokens = part.dataset.count_tokens(part.documents)
        sample_map, order = build_token_map(
            part.dataset,
            part.documents,
            samples=samples,
            seq_length=seq_length,
            seed=self._config.train.seed,
            cache_dir=part.cache_dir,
        )
        dataset = GPTDataset(
            part.dataset,
            part.documents,
            sample_map,
            order,
            length=samples,
            seq_length=seq_length,
            ends=self._ends,
        )
        return Made(samples=dataset, per_epoch=tokens / seq_length)


def _has_ends(dataset: IndexedDataset, documents: range, eod: int) -> bool:
    """Whether one of some documents, taken here and there, ends with the token."""
    for place in np.linspace(0, len(documents) - 1, LOOKED_AT).round():
        first, end = dataset.documents[documents[int(place)] : documents[int(place)] + 2]
        if end > first and (dataset[end - 1][-1:] == eod).any():
            return True
    return False
