"""The memory-mapped dataset of token sequences that the Megatron family reads and writes.

PREFIX.bin holds the tokens of all sequences, nothing else. PREFIX.idx, little-endian, tells where
each sequence stands and which sequences make a document:

    offset   content
    0        the 9 bytes MMIDIDX\\0\\0
    9        u64 version, 1
    17       u8 code of the token's number format
    18       u64 N, number of sequences
    26       u64 D, number of document boundaries, one more than documents
    34       i32[N] tokens of each sequence
    34+4N    i64[N] byte at which each sequence starts in the .bin
    34+12N   i64[D] boundaries: document d holds sequences boundaries[d] to boundaries[d + 1]

`IndexedDataset` reads, and finds any damage when it opens; `build_indexed_dataset` writes.
"""

import contextlib
import functools
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megatron.data.files import written_aside
from megatron.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
CODE_OF_DTYPE = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "f8": 6, "f4": 7, "u2": 8}
DTYPE_OF_CODE = {code: np.dtype(f"<{name}") for name, code in CODE_OF_DTYPE.items()}
CHUNK_BYTES = 1 << 26
PIECE = 1 << 20  # entries of an index, or tokens, that are looked at together


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest number format of the ecosystem for a vocabulary."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def bin_path(prefix: str | Path) -> Path:
    """The file with the tokens of the dataset `prefix`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file with the places of the dataset `prefix`."""
    return Path(f"{prefix}.idx")


def pieces(length: int, most: int | None = None) -> Iterator[range]:
    """The places from 0 to `length` in stretches; of more than `most`, about so many of them.

    They are then spread over all, the first and the last stretch always among them.
    """
    last = -(-length // PIECE) - 1
    count = last + 1 if most is None else min(last + 1, max(2, -(-most // PIECE)))
    for number in sorted({round(place) for place in np.linspace(0, last, count)}):
        yield range(number * PIECE, min(length, (number + 1) * PIECE))


class IndexedDataset:
    """Reads the dataset PREFIX.idx and PREFIX.bin; sequence i is an array of its tokens.

    sizes: i32 [sequences], tokens of each; documents: i64 [documents + 1], where each document's
    sequences begin; pointers: i64 [sequences], bytes. Raises DataError where a file is missing,
    truncated or otherwise damaged, naming the file, the offset, what was found and expected.
    most: about how many sequences and documents are held against the files' sizes, all by default.
    """

    def __init__(self, prefix: str | Path, *, most: int | None = None) -> None:
        self.prefix = str(prefix)
        self._most = most
        self._read_index(idx_path(prefix))
        self._open_tokens(bin_path(prefix))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        start = int(self.pointers[index])
        return np.frombuffer(self._bin, self.dtype, int(self.sizes[index]), start)

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.prefix,)  # a process that gets a copy maps the files anew

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """All tokens of the .bin."""
        return np.frombuffer(self._bin, self.dtype, len(self._bin) // self.dtype.itemsize)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all sizes and boundaries, the same wherever the files lie."""
        return hashlib.sha256(self._idx.data).hexdigest()

    def document_lengths(self, documents: range) -> npt.NDArray[np.int64]:
        """Tokens of each of some documents, i64 [documents]."""
        bounds = self.documents[documents.start : documents.stop + 1]
        sizes = self.sizes[bounds[0] : bounds[-1]]
        ends = np.append(0, np.cumsum(sizes, dtype=np.int64))
        return np.diff(ends[bounds - bounds[0]])

    def count_tokens(self, documents: range, *, enough: int | None = None) -> int:
        """Tokens of some documents together; the count may end where it has reached `enough`."""
        first, end = self.documents[documents.start], self.documents[documents.stop]
        tokens = 0
        for piece in pieces(int(end - first)):
            if enough is not None and tokens >= enough:
                break
            sizes = self.sizes[first + piece.start : first + piece.stop]
            tokens += int(sizes.sum(dtype=np.int64))
        return tokens

    def read_document(self, document: int, offset: int, most: int) -> npt.NDArray[Any]:
        """Tokens of a document from `offset` on, at most so many; fewer where it ends before."""
        first, end = self.documents[document : document + 2].tolist()
        ends = np.cumsum(self.sizes[first:end], dtype=np.int64)
        begin = int(np.searchsorted(ends, offset, side="right"))
        stop = int(np.searchsorted(ends, offset + most)) + 1
        sequences = [self[i] for i in range(first + begin, min(first + stop, end))]
        if not sequences:
            return np.zeros(0, self.dtype)
        # One sequence alone, which may be a whole book, is not copied.
        tokens = sequences[0] if len(sequences) == 1 else np.concatenate(sequences)
        skipped = offset - (int(ends[begin - 1]) if begin else 0)
        return tokens[skipped : skipped + most]

    def warm_up(self) -> None:
        """Read the tokens once, so that the operating system has them in memory."""
        for start in range(0, len(self._bin), CHUNK_BYTES):
            self._bin[start : start + CHUNK_BYTES : 4096].max()  # a byte of every page

    def _read_index(self, path: Path) -> None:
        self._idx = idx = _map_file(path)
        if len(idx) < HEADER.size:
            raise DataError(f"{path}: {len(idx)} bytes, too short for the header of {HEADER.size}")
        magic, version, code, sequences, boundaries = HEADER.unpack(idx[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise DataError(f"{path}: offset 0 holds {magic!r}, expected {MAGIC!r}")
        if version != VERSION:
            raise DataError(f"{path}: offset 9 holds version {version}, expected {VERSION}")
        if code not in DTYPE_OF_CODE:
            raise DataError(
                f"{path}: offset 17 holds number format {code}, expected 1 to {len(DTYPE_OF_CODE)}"
            )
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if len(idx) != expected:
            raise DataError(
                f"{path}: {len(idx)} bytes; its header of {sequences} sequences and {boundaries} "
                f"document boundaries needs {expected}"
            )
        at = HEADER.size
        self.dtype = DTYPE_OF_CODE[code]
        self.sizes = np.frombuffer(idx, "<i4", sequences, at)
        self.pointers = np.frombuffer(idx, "<i8", sequences, at + 4 * sequences)
        self.documents = np.frombuffer(idx, "<i8", boundaries, at + 12 * sequences)
        self._check_documents(path, at + 12 * sequences)

    def _check_documents(self, path: Path, at: int) -> None:
        if len(self.documents) == 0 or self.documents[0] != 0:
            found = self.documents[0] if len(self.documents) else "nothing"
            raise DataError(f"{path}: offset {at} holds {found}, expected document boundary 0")
        for piece in pieces(len(self.documents), self._most):
            bounds = self.documents[piece.start : piece.stop + 1]
            falling = np.flatnonzero(bounds[1:] < bounds[:-1])
            if len(falling):
                i = piece.start + int(falling[0]) + 1
                raise DataError(
                    f"{path}: offset {at + 8 * i} holds document boundary {self.documents[i]}, "
                    f"expected at least {self.documents[i - 1]}"
                )
        if self.documents[-1] != len(self):
            raise DataError(
                f"{path}: offset {at + 8 * (len(self.documents) - 1)} holds the last document "
                f"boundary {self.documents[-1]}, expected the number of sequences {len(self)}"
            )

    def _open_tokens(self, path: Path) -> None:
        self._bin = _map_file(path)
        if self.dtype == np.dtype("<f4") and len(self._bin) == 8 * self.sizes.sum(dtype=np.int64):
            self.dtype = np.dtype("<f8")  # what old files mean by this code
        end = max((self._end_of(piece) for piece in pieces(len(self), self._most)), default=0)
        is_whole = len(list(pieces(len(self), self._most))) == len(list(pieces(len(self))))
        if len(self._bin) != end and is_whole:
            raise DataError(
                f"{path}: {len(self._bin)} bytes, expected {end} by its .idx; the "
                "two are not of the same dataset"
            )

    def _end_of(self, piece: range) -> int:
        """The byte behind the last token of some sequences, whose places are checked."""
        within = slice(piece.start, piece.stop)
        pointers = self.pointers[within]
        ends = pointers + self.sizes[within].astype(np.int64) * self.dtype.itemsize
        # The second also finds negative sizes, and sums beyond what an i64 holds.
        outside = (pointers < 0) | (ends < pointers) | (ends > len(self._bin))
        wrong = np.flatnonzero(outside | (pointers % self.dtype.itemsize != 0))
        if len(wrong):
            i = int(wrong[0])
            place = HEADER.size + 4 * len(self) + 8 * (piece.start + i)
            all_bytes = self.sizes.sum(dtype=np.int64) * self.dtype.itemsize
            raise DataError(
                f"{idx_path(self.prefix)}: offset {place} places "
                f"sequence {piece.start + i} at bytes {pointers[i]} to {ends[i]}, expected whole "
                f"tokens within the {len(self._bin)} bytes of {bin_path(self.prefix)}; "
                f"all its sequences have {all_bytes}"
            )
        return int(ends.max(initial=0))


@contextlib.contextmanager
def build_indexed_dataset(
    prefix: str | Path, dtype: npt.DTypeLike
) -> Iterator["IndexedDatasetBuilder"]:
    """A builder whose dataset appears when the block ends without an exception.

    Until then PREFIX.idx and PREFIX.bin are what they were before.
    """
    with written_aside(bin_path(prefix), idx_path(prefix)) as (tokens, index):
        builder = IndexedDatasetBuilder(tokens, dtype)
        yield builder
        builder.write_index(index)


class IndexedDatasetBuilder:
    """Writes documents one after the other; `dtype` is the number format of their tokens."""

    def __init__(self, file: BinaryIO, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._file = file
        self._sizes = [np.zeros(0, np.int32)]
        self._documents = [np.zeros(1, np.int64)]
        self.documents = 0  # so far
        self.sequences = 0
        self.tokens = 0

    def add(
        self, tokens: npt.ArrayLike, sizes: npt.ArrayLike, sequences_per_document: npt.ArrayLike
    ) -> None:
        """Append documents: all tokens, how many make each sequence, sequences of each document."""
        tokens = np.asarray(tokens, self.dtype)
        sizes = np.asarray(sizes, np.int32)
        counts = np.asarray(sequences_per_document, np.int64)
        assert sizes.sum(dtype=np.int64) == len(tokens) and counts.sum() == len(sizes)
        self._file.write(tokens.tobytes())
        self._sizes.append(sizes)
        self._documents.append(self.sequences + np.cumsum(counts))
        self.documents += len(counts)
        self.sequences += len(sizes)
        self.tokens += len(tokens)

    def merge(self, other: IndexedDataset) -> None:
        """Append all documents of another dataset; raises DataError on another number format."""
        if other.dtype != self.dtype:
            raise DataError(
                f"{other.prefix}.bin: tokens are {other.dtype}, expected {self.dtype} to merge"
            )
        for first in range(0, len(other.documents) - 1, 1024):
            bounds = other.documents[first : first + 1025]
            sequences = [other[i] for i in range(bounds[0], bounds[-1])]
            tokens = np.concatenate(sequences) if sequences else np.zeros(0, self.dtype)
            self.add(tokens, other.sizes[bounds[0] : bounds[-1]], np.diff(bounds))

    def write_index(self, file: BinaryIO) -> None:
        """Write the .idx of all that was added."""
        sizes = np.concatenate(self._sizes)
        documents = np.concatenate(self._documents)
        lengths = sizes.astype(np.int64) * self.dtype.itemsize
        code = CODE_OF_DTYPE[self.dtype.str[1:]]
        file.write(HEADER.pack(MAGIC, VERSION, code, len(sizes), len(documents)))
        file.write(sizes.astype("<i4").tobytes())
        file.write((np.cumsum(lengths) - lengths).astype("<i8").tobytes())
        file.write(documents.astype("<i8").tobytes())


def _map_file(path: Path) -> npt.NDArray[np.uint8]:
    try:
        if os.path.getsize(path) == 0:
            return np.zeros(0, np.uint8)  # an empty file cannot be mapped
        return np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise DataError(f"{path}: cannot open the dataset: {error.strerror}") from error
