"""The samples of T5: text of which spans are missing, and the spans to be written down.

1. The sample map says which sentences of a document make sample i, and how many tokens it aims at.
2. They are shortened to that many, at random from either end.
3. Spans are taken out (`megatron.data.spans`): what is left is the encoder's, what is missing the
   decoder's to predict. It is given the target one place behind, from the token on that begins a
   text ([CLS] of a WordPiece vocabulary, as in the Megatron family):

    encoder_ids   Thank you <0> me to your party <1> week
    decoder_ids   [CLS] <0> for inviting <1> last
    labels        <0>   for inviting <1> last <2>

All that is random in sample i is a function of the seed, the split and i.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.bert_dataset import truncate
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.sample_map import SampleMap
from megatron.data.spans import SpanCorruption
from megatron.tokenizer import Tokenizer


class T5Dataset:
    """Sample i as a dictionary of arrays, for s = seq_length and d = decoder_seq_length:

    encoder_ids i64 [s], decoder_ids i64 [d], labels i64 [d], loss_weights f32 [d] (1: a label, 0:
    padding) and encoder_mask bool [s] (True: a token, False: padding). The decoder needs no mask:
    its padding stands behind all labels, which do not look ahead.

    samples: of at most `corruption.longest_text` tokens each; stream: what the random numbers come
    from, the seed and the number of the split.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        samples: SampleMap,
        tokenizer: Tokenizer,
        corruption: SpanCorruption,
        *,
        length: int,
        stream: tuple[int, int],
    ) -> None:
        assert length <= len(samples)
        assert corruption.sentinels_needed <= len(tokenizer.sentinels)
        self._dataset = dataset
        self._samples = samples
        self._corruption = corruption
        self._length = length
        self._stream = stream
        self._bos, self._pad = tokenizer.bos, tokenizer.pad
        self._sentinels = np.array(tokenizer.sentinels, np.int64)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        source = np.random.SeedSequence((*self._stream, index))
        random = np.random.Generator(np.random.Philox(source))
        first, end, target = self._samples[index].tolist()
        text = np.concatenate([self._dataset[i].astype(np.int64) for i in range(first, end)])
        (text,) = truncate([text], target, random)
        if len(text) == 0:
            text = np.array([self._pad])  # attention needs a token to look at
        return self._assemble(*self._corruption.apply(text, self._sentinels, random))

    def _assemble(
        self, encoder: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
    ) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a sample of this encoder input and target."""
        s, d = self._corruption.seq_length, self._corruption.decoder_seq_length
        decoder = np.append(self._bos, labels[:-1])
        return {
            "encoder_ids": self._padded(encoder, s),
            "decoder_ids": self._padded(decoder, d),
            "labels": self._padded(labels, d),
            "loss_weights": (np.arange(d) < len(labels)).astype(np.float32),
            "encoder_mask": np.arange(s) < len(encoder),
        }

    def _padded(self, ids: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        return np.pad(ids, (0, length - len(ids)), constant_values=self._pad)
