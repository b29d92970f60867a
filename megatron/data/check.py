"""What is wrong with the data of a run, all of it at once, before any index file is built.

Of each dataset of --data-path, by the very rules by which training builds its samples:

1. Its header, and that sizes and places agree with the two files.
2. That tokens are of the vocabulary.
3. That --split leaves documents to each split, and these a sample.
4. That index files can be written, or are all there.

Nothing is written. The cost does not grow with the data: of a dataset of more than `MOST_ENTRIES`
sequences, documents or tokens, stretches spread over the whole are looked at. A fault between them
is left for training to find. Datasets of a blend share that number.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from megatron.blend import parse_blend
from megatron.config import Config
from megatron.data.bert_build import BertMaker, BertRule
from megatron.data.blended_dataset import build_blend_map, samples_needed, whole_weights
from megatron.data.build import TRAINING, Maker, Rule, Source, cache_folder, why_empty
from megatron.data.gpt_build import GPTMaker, GPTRule
from megatron.data.indexed_dataset import PIECE, IndexedDataset
from megatron.data.t5_build import T5Maker, T5Rule
from megatron.data.token_check import check_format, check_tokens, look_at_tokens
from megatron.errors import ConfigError
from megatron.tokenizer import Tokenizer
from megatron.validation.checks import mistakes_of
from megatron.validation.files import datasets_exist
from megatron.validation.places import WARNING, why_not_writable

MOST_ENTRIES = 1 << 24
_SERIOUS = 0.5  # share of documents or sentences from which on a remark is a warning
_REMARKED_ON = 1 << 20  # documents

_RULES: Mapping[str, Callable[[Config], Rule]] = {
    "bert": BertRule,
    "gpt": GPTRule,
    "t5": lambda config: T5Rule(config, config.data.vocab_extra_ids),
}
_MAKERS: Mapping[str, Callable[[Config, Tokenizer], Maker]] = {
    "bert": BertMaker,
    "gpt": GPTMaker,
    "t5": T5Maker,
}


def data_problems(
    config: Config, tokenizer: Tokenizer | None, wanted: tuple[int, int, int]
) -> list[str]:
    """A line for each thing that is wrong; what training would live with is a warning.

    tokenizer: None where it cannot be loaded; then tokens are held against --vocab-size alone.
    wanted: the samples of training, validation and test that a run takes.
    """
    if not config.data.data_path:
        return []
    try:
        blend = parse_blend(config.data.data_path)
    except ConfigError as error:
        return list(error.problems)
    weights = whole_weights([weight for weight, _ in blend])
    shares = [
        samples_needed(weights, samples) if samples else [0] * len(blend) for samples in wanted
    ]
    problems: list[str] = []
    rule: Rule | None = None
    maker: Maker | None = None
    kind = config.model.model_type
    try:
        if tokenizer is not None:
            rule = maker = _MAKERS[kind](config, tokenizer)
        else:
            rule = _RULES[kind](config)
    except ConfigError as error:
        problems += error.problems
    vocab_size = config.model.vocab_size if maker is None else maker.vocab_size
    look = _Look(config, rule, maker, vocab_size, max(2 * PIECE, MOST_ENTRIES // len(blend)))
    for (_, prefix), *needed in zip(blend, *shares, strict=True):
        problems += mistakes_of(partial(look.problems, prefix, needed))
    problems += mistakes_of(lambda: look.blend_map(blend[0][1], weights, wanted[TRAINING]))
    problems += _too_many_files(config, len(blend), wanted)
    return list(dict.fromkeys(problems))


@dataclass(frozen=True)
class _Look:
    """How the datasets of a run are looked at.

    rule, maker: None where the flags or the tokenizer do not allow for one; vocab_size: None where
    it is not known; most: entries of a dataset that are looked at.
    """

    config: Config
    rule: Rule | None
    maker: Maker | None
    vocab_size: int | None
    most: int

    def problems(self, prefix: str, needed: Sequence[int]) -> list[str]:
        """All lines about a dataset of which each split takes so many samples."""
        datasets_exist((prefix,))
        source = Source.of(self.config, 1.0, IndexedDataset(prefix, most=self.most))
        checks = (self._tokens, self._parts, self._index_files)
        return [line for check in checks for line in mistakes_of(partial(check, source, needed))]

    def _tokens(self, source: Source, needed: Sequence[int]) -> None:
        check_format(source.dataset)
        if self.vocab_size is not None:
            look_at_tokens(source.dataset, self.vocab_size, self.most)

    def _parts(self, source: Source, needed: Sequence[int]) -> Iterator[str]:
        if self.rule is None:
            return
        for part, samples in zip(source.parts, needed, strict=True):
            shortage = why_empty(part, self.rule, self.config.data.split) if samples else None
            if shortage is not None and part.split == TRAINING:
                yield shortage
            elif shortage is not None:
                yield f"{WARNING}{part.name}: skipped, since {shortage}"
            elif samples and part.split == TRAINING:
                # Of a long part the beginning speaks for the rest.
                remark = self.rule.remark(replace(part, documents=part.documents[:_REMARKED_ON]))
                if remark.share >= _SERIOUS:
                    yield f"{WARNING}{part.dataset.prefix}: {remark.text.removeprefix('; ')}"

    def _index_files(self, source: Source, needed: Sequence[int]) -> Iterator[str]:
        """Where nothing can be written, building finds what it needs, or says what it lacks."""
        reason = why_not_writable(source.cache_dir)
        if reason is None:
            return
        if self.maker is None:
            yield (
                f"{WARNING}{source.cache_dir}: {reason}, so that training can only use index files "
                "that are there already; --data-cache-dir names another directory"
            )
            return
        check_tokens(source.dataset, self.maker.vocab_size, source.cache_dir)
        for part, samples in zip(source.parts, needed, strict=True):
            if samples and why_empty(part, self.maker, self.config.data.split) is None:
                self.maker.make(part, samples)

    def blend_map(self, first: str, weights: Sequence[int], samples: int) -> None:
        """As `_index_files`, of the order of a blend, which lies with its first dataset's."""
        cache_dir = cache_folder(self.config, first)
        if len(weights) > 1 and samples and why_not_writable(cache_dir) is not None:
            build_blend_map(weights, samples=samples, cache_dir=cache_dir)


def _too_many_files(config: Config, datasets: int, wanted: Sequence[int]) -> Iterator[str]:
    """A memory-mapped file stays open: two of a dataset, and the index files of its splits."""
    of_a_split = 2 if config.model.model_type == "gpt" else 1
    needed = datasets * (2 + of_a_split * sum(samples > 0 for samples in wanted))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and needed > limit:
        yield (
            f"--data-path: its {datasets} datasets keep {needed} files open at least on each rank, "
            f"where {limit} are allowed: raise the limit with ulimit -n"
        )
