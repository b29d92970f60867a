"""The samples of BERT: two segments of text, some words hidden, and whether they are in order.

1. The sample map says which sentences of a document make sample i, and how many tokens it aims at.
2. With a binary head the sentences are cut into two segments A and B at random, and half the time
   exchanged; whether they were is the label that the head learns.
3. Both are shortened to the target, at random from either end.
4. [CLS] A [SEP] B [SEP], then whole words are hidden and all is padded to seq_length.

All that is random in sample i is a function of the seed, the split and i.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.masking import Masking
from megatron.data.sample_map import SampleMap
from megatron.tokenizer import Tokenizer


class BertDataset:
    """Sample i as a dictionary of arrays, for s = seq_length and k = masking.most:

    input_ids i64 [s], tokentype_ids i64 [s] (0 for A and padding, 1 for B), attention_mask bool [s]
    (True: a token), masked_positions i64 [k], masked_labels i64 [k], masked_weights f32 [k] (1:
    hidden, 0: padding), is_random i64 [] (1: the segments were exchanged).

    stream: what the random numbers come from, the seed and the number of the split.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        samples: SampleMap,
        tokenizer: Tokenizer,
        masking: Masking,
        *,
        length: int,
        seq_length: int,
        binary_head: bool,
        stream: tuple[int, int],
    ) -> None:
        assert length <= len(samples)
        self._dataset = dataset
        self._samples = samples
        self._masking = masking
        self._length = length
        self._seq_length = seq_length
        self._binary_head = binary_head
        self._stream = stream
        self._cls, self._sep, self._pad = tokenizer.cls, tokenizer.sep, tokenizer.pad

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        source = np.random.SeedSequence((*self._stream, index))
        random = np.random.Generator(np.random.Philox(source))
        first, end, target = self._samples[index].tolist()
        sentences = [self._dataset[i].astype(np.int64) for i in range(first, end)]
        is_random = False
        if self._binary_head:
            cut = int(random.integers(1, len(sentences)))
            segments = [np.concatenate(sentences[:cut]), np.concatenate(sentences[cut:])]
            is_random = bool(random.random() < 0.5)
            if is_random:
                segments.reverse()
        else:
            segments = [np.concatenate(sentences)]
        return self._assemble(truncate(segments, target, random), is_random, random)

    def _assemble(
        self, segments: list[npt.NDArray[np.int64]], is_random: bool, random: np.random.Generator
    ) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a sample of one or two segments."""
        parts: list[npt.NDArray[np.int64]] = [np.array([self._cls])]
        for segment in segments:
            parts += [segment, np.array([self._sep])]
        tokens = np.concatenate(parts)
        ends = np.cumsum([len(segment) + 1 for segment in segments])  # where each [SEP] stands
        fixed = np.zeros(len(tokens), np.bool_)
        fixed[0] = True
        fixed[ends] = True
        hidden, positions = self._masking.apply(tokens, fixed, random)
        tokentypes = np.zeros(len(tokens), np.int64)
        tokentypes[ends[0] + 1 :] = 1
        s, k = self._seq_length, self._masking.most
        return {
            "input_ids": _padded(hidden, s, self._pad),
            "tokentype_ids": _padded(tokentypes, s),
            "attention_mask": _padded(np.ones(len(tokens), np.bool_), s),
            "masked_positions": _padded(positions, k),
            "masked_labels": _padded(tokens[positions], k),
            "masked_weights": _padded(np.ones(len(positions), np.float32), k),
            "is_random": np.array(is_random, np.int64),
        }


def truncate(
    segments: list[npt.NDArray[np.int64]], target: int, random: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """The segments shortened to `target` tokens in all, the longer ones first.

    What is cut comes off the front and the back, each token by the throw of a coin, so that the
    model sees beginnings and ends alike.
    """
    kept = _kept([len(segment) for segment in segments], target)
    shortened = []
    for segment, length in zip(segments, kept, strict=True):
        front = int(random.binomial(len(segment) - length, 0.5))
        shortened.append(segment[front : front + length])
    return shortened


def _kept(lengths: list[int], target: int) -> list[int]:
    """How much of one or two segments stays: of (70, 20) for a target of 60, (40, 20)."""
    if len(lengths) == 1:
        return [min(lengths[0], target)]
    first = min(lengths[0], max((target + 1) // 2, target - lengths[1]))
    return [first, min(lengths[1], target - first)]


def _padded(values: npt.NDArray[Any], length: int, padding: int = 0) -> npt.NDArray[Any]:
    result = np.full(length, padding, values.dtype)
    result[: len(values)] = values
    return result
