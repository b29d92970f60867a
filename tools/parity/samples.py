"""Samples of random tokens, with the fields and the shapes of the real ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.config import Config
from megatron.training.task import Batch

SHARE_OF_ENDS = 0.2
"""The probability that a token ends a document."""


def synthetic_samples(config: Config, count: int, seed: int) -> list[Batch]:
    """``count`` samples for the model of ``config``, without the dim of the batch.

    Samples have different numbers of tokens that count, so that a mean over micro-batches is told
    from a mean over tokens. The end of a document is the last token of the vocabulary.
    """
    draw = _Draw(config, torch.Generator().manual_seed(seed))
    make = {"bert": draw.bert, "gpt": draw.gpt, "t5": draw.t5}[config.model.model_type]
    return [make() for _ in range(count)]


def collate(samples: Sequence[Batch]) -> Batch:
    """One batch of some samples."""
    return {name: torch.stack([one[name] for one in samples]) for name in samples[0]}


def own_micro_batches(
    config: Config, samples: Sequence[Batch], data_rank: int, data_size: int
) -> list[Batch]:
    """The micro-batches of one data-parallel rank from the samples of a global batch."""
    share, size = len(samples) // data_size, config.train.micro_batch_size
    own = samples[data_rank * share : (data_rank + 1) * share]
    return [collate(own[i : i + size]) for i in range(0, share, size)]


class _Draw:
    """Makes samples from one stream of random numbers."""

    def __init__(self, config: Config, generator: torch.Generator) -> None:
        assert config.model.vocab_size is not None, "the vocabulary's size is known by now"
        self._vocabulary = config.model.vocab_size
        self._data = config.data
        self._generator = generator

    def _below(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator)

    def _tokens(self, length: int) -> Tensor:
        return 1 + self._below(self._vocabulary - 1, length)  # 0 is padding

    def _real(self, length: int, least: int = 1) -> Tensor:
        """bool[length], True for the first of them, at least ``least``."""
        return torch.arange(length) < least + self._below(length + 1 - least, 1)

    def bert(self) -> Batch:
        s = self._data.seq_length
        masked = max(1, round(self._data.mask_prob * s))
        real = self._real(s)
        return {
            "input_ids": self._tokens(s),
            "tokentype_ids": self._below(2, s),
            "attention_mask": real,
            "masked_positions": self._below(s, masked) % real.sum(),
            "masked_labels": self._tokens(masked),
            "masked_weights": self._real(masked, least=0).float(),
            "is_random": self._below(2, 1)[0],
        }

    def gpt(self) -> Batch:
        s, data = self._data.seq_length, self._data
        ends = torch.rand(s + 1, generator=self._generator) < SHARE_OF_ENDS
        tokens = self._below(self._vocabulary - 1, s + 1)
        tokens[ends] = self._vocabulary - 1
        weights = torch.ones(s)
        if data.eod_mask_loss:
            weights[ends[:-1]] = 0.0
        sample = {"tokens": tokens, "loss_weights": weights}
        lengths = _lengths(ends[:-1])
        if data.reset_position_ids:
            begins = lengths.cumsum(0) - lengths
            sample["position_ids"] = torch.arange(s) - begins.repeat_interleave(lengths)
        if data.reset_attention_mask:
            sample["document_lengths"] = torch.cat((lengths, lengths.new_zeros(s - len(lengths))))
        return sample

    def t5(self) -> Batch:
        s, d = self._data.seq_length, self._data.decoder_length
        real = self._real(d)
        return {
            "encoder_ids": self._tokens(s),
            "decoder_ids": self._tokens(d),
            "labels": self._tokens(d),
            "loss_weights": real.float(),
            "encoder_mask": self._real(s),
            "decoder_mask": real,
        }


def _lengths(ends: Tensor) -> Tensor:
    """The lengths of the documents of a row, from where each ends; the last may go on behind it."""
    stops = ends.nonzero().flatten() + 1
    if not len(stops) or int(stops[-1]) < len(ends):
        stops = torch.cat((stops, torch.tensor([len(ends)])))
    return stops.diff(prepend=torch.zeros(1, dtype=torch.int64))
