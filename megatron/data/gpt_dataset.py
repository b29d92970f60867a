"""The samples of GPT: stretches of text that run on from one document into the next.

`megatron.data.index_builder` describes how the documents become one stream and that samples. A
document ends with the end-of-document token; what stands behind it belongs to another document, as
position, attention and loss may be told.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.sample_map import SampleMap


@dataclass(frozen=True, kw_only=True)
class DocumentEnds:
    """What is done behind `eod`, the token that ends a document.

    mask_loss: what it predicts does not count; reset_position_ids: positions start from 0 again;
    reset_attention_mask: no token looks beyond the start of its document.
    """

    eod: int
    mask_loss: bool
    reset_position_ids: bool
    reset_attention_mask: bool


class GPTDataset:
    """Sample i as a dictionary of arrays, for s = seq_length:

    tokens i64 [s + 1], of which the first s are the input and the last s the labels; loss_weights
    f32 [s] (0: the label does not count); with `ends.reset_position_ids` position_ids i64 [s]; with
    `ends.reset_attention_mask` document_lengths i64 [s], the tokens of the input that belong to
    each document, 0 behind the last.

    samples and order: the maps of `build_token_map` for `documents`; ends: None where the end of a
    document has no effect.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: range,
        samples: SampleMap,
        order: SampleMap,
        *,
        length: int,
        seq_length: int,
        ends: DocumentEnds | None,
    ) -> None:
        assert length <= len(samples)
        self._dataset = dataset
        self._documents = documents
        self._samples = samples
        self._order = order
        self._length = length
        self._seq_length = seq_length
        self._ends = ends

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        tokens = self._read(index)
        weights = np.ones(self._seq_length, np.float32)
        sample: dict[str, npt.NDArray[Any]] = {"tokens": tokens, "loss_weights": weights}
        if self._ends is None:
            return sample
        is_end = tokens[:-1] == self._ends.eod
        if self._ends.mask_loss:
            weights[is_end] = 0.0
        lengths = _document_lengths(is_end)
        if self._ends.reset_position_ids:
            begins = np.cumsum(lengths) - lengths
            sample["position_ids"] = np.arange(self._seq_length) - np.repeat(begins, lengths)
        if self._ends.reset_attention_mask:
            sample["document_lengths"] = lengths
        return sample

    def _read(self, index: int) -> npt.NDArray[np.int64]:
        """The tokens of a sample, from as many documents as it takes."""
        place, offset = self._samples[index].tolist()
        tokens = np.empty(self._seq_length + 1, np.int64)
        filled = 0
        while filled < len(tokens):
            document = self._documents[int(self._order[place][0])]
            part = self._dataset.read_document(document, offset, len(tokens) - filled)
            tokens[filled : filled + len(part)] = part
            filled += len(part)
            place, offset = place + 1, 0
        return tokens


def _document_lengths(is_end: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The lengths of documents that end where is_end [s] says, and of the rest: i64 [s], zeros
    behind the last."""
    ends = np.flatnonzero(is_end) + 1
    if len(ends) == 0 or ends[-1] < len(is_end):
        ends = np.append(ends, len(is_end))
    lengths = np.zeros(len(is_end), np.int64)
    lengths[: len(ends)] = np.diff(ends, prepend=0)
    return lengths
