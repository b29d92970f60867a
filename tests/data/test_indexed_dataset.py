"""Properties of the indexed dataset's reader and writer."""

import contextlib
import pickle
import struct
from itertools import chain, count, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import IndexedDataset, IndexedDatasetBuilder, build_indexed_dataset, token_dtype
from megatron.errors import DataError
from tests.data.support import EXAMPLES, Documents, write_dataset

DOCUMENTS = [[[1, 2, 3], [4]], [[5, 6]]]
# The same documents, put together by hand from the table of offsets.
IDX = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<Q", 1)
    + struct.pack("<B", 8)
    + struct.pack("<QQ", 3, 3)
    + struct.pack("<3i", 3, 1, 2)
    + struct.pack("<3q", 0, 6, 8)
    + struct.pack("<3q", 0, 2, 3)
)
BIN = struct.pack("<6H", 1, 2, 3, 4, 5, 6)

documents_strategy = st.lists(
    st.lists(st.lists(st.integers(0, 65499), max_size=9), min_size=1, max_size=5), max_size=6
)


def as_documents(dataset: IndexedDataset) -> Documents:
    """The documents that a dataset holds."""
    sequences = [dataset[i].tolist() for i in range(len(dataset))]
    bounds = dataset.documents.tolist()
    return [sequences[a:b] for a, b in pairwise(bounds)]


def write_bytes(prefix: Path, idx: bytes, tokens: bytes) -> Path:
    """A dataset of these bytes."""
    prefix.with_suffix(".idx").write_bytes(idx)
    prefix.with_suffix(".bin").write_bytes(tokens)
    return prefix


def test_writes_the_bytes_of_the_format(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", DOCUMENTS)
    assert (tmp_path / "d.idx").read_bytes() == IDX
    assert (tmp_path / "d.bin").read_bytes() == BIN


def test_reads_the_bytes_of_the_format(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_bytes(tmp_path / "d", IDX, BIN))
    assert as_documents(dataset) == DOCUMENTS
    assert dataset.dtype == np.uint16
    assert dataset.tokens.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (6, "d"), (7, "f")]
)
def test_reads_every_number_format(tmp_path: Path, code: int, letter: str) -> None:
    size = struct.calcsize(letter)
    idx = (
        IDX[:17] + struct.pack("<B", code) + IDX[18:46] + struct.pack("<3q", 0, 3 * size, 4 * size)
    )
    dataset = IndexedDataset(
        write_bytes(tmp_path / "d", idx + IDX[70:], struct.pack(f"<6{letter}", *range(1, 7)))
    )
    assert as_documents(dataset) == DOCUMENTS


def test_reads_old_files_of_doubles(tmp_path: Path) -> None:
    idx = IDX[:17] + b"\x07" + IDX[18:46] + struct.pack("<3q", 0, 24, 32) + IDX[70:]
    dataset = IndexedDataset(write_bytes(tmp_path / "d", idx, struct.pack("<6d", *range(1, 7))))
    assert as_documents(dataset) == DOCUMENTS


@given(documents=documents_strategy, dtype=st.sampled_from(["u2", "i4"]))
@settings(EXAMPLES, max_examples=60)
def test_reads_what_it_writes(tmp_path: Path, documents: Documents, dtype: str) -> None:
    assert as_documents(write_dataset(tmp_path / "d", documents, dtype)) == documents


@given(parts=st.lists(documents_strategy, min_size=1, max_size=3))
@settings(EXAMPLES, max_examples=30)
def test_merging_keeps_documents(tmp_path: Path, parts: list[Documents]) -> None:
    with build_indexed_dataset(tmp_path / "all", "u2") as builder:
        for number, documents in enumerate(parts):
            builder.merge(write_dataset(tmp_path / f"part{number}", documents))
    merged = as_documents(IndexedDataset(tmp_path / "all"))
    assert merged == [document for documents in parts for document in documents]


def test_merging_refuses_another_format(tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", DOCUMENTS, "i4")
    with (
        pytest.raises(DataError, match=r"other\.bin: tokens are int32, expected uint16"),
        build_indexed_dataset(tmp_path / "all", "u2") as builder,
    ):
        builder.merge(other)
    assert {path.name for path in tmp_path.iterdir()} == {"other.idx", "other.bin"}


@pytest.mark.parametrize("length", range(len(IDX)))
def test_finds_a_truncated_idx(tmp_path: Path, length: int) -> None:
    prefix = write_bytes(tmp_path / "d", IDX[:length], BIN)
    with pytest.raises(DataError, match=rf"d\.idx: {length} bytes"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("length", range(len(BIN)))
def test_finds_a_truncated_bin(tmp_path: Path, length: int) -> None:
    prefix = write_bytes(tmp_path / "d", IDX, BIN[:length])
    with pytest.raises(DataError, match=rf"d\.idx: offset \d+ .* within the {length} bytes of "):
        IndexedDataset(prefix)


def test_finds_a_bin_that_is_too_long(tmp_path: Path) -> None:
    prefix = write_bytes(tmp_path / "d", IDX, BIN + b"\0\0")
    with pytest.raises(DataError, match=r"d\.bin: 14 bytes, expected 12"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_names_a_missing_file(tmp_path: Path, suffix: str) -> None:
    prefix = write_bytes(tmp_path / "d", IDX, BIN)
    prefix.with_suffix(suffix).unlink()
    with pytest.raises(DataError, match=rf"d\{suffix}: cannot open .*No such file"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"MMIDIDY", r"offset 0 holds b'MMIDIDY.*expected b'MMIDIDX"),
        (9, b"\x02", "offset 9 holds version 2, expected 1"),
        (17, b"\x09", "offset 17 holds number format 9, expected 1 to 8"),
        (18, b"\xff" * 8, "94 bytes; its header of 18446744073709551615 sequences"),
        (34, struct.pack("<i", -1), "offset 46 places sequence 0 at bytes 0 to -2"),
        (54, struct.pack("<q", 2**63 - 1), "offset 54 places sequence 1"),
        (54, struct.pack("<q", 7), "offset 54 places sequence 1 at bytes 7 to 9, expected whole"),
        (70, struct.pack("<q", 1), "offset 70 holds 1, expected document boundary 0"),
        (78, struct.pack("<q", 9), "offset 86 holds document boundary 3, expected at least 9"),
        (86, struct.pack("<q", 2), "offset 86 holds the last document boundary 2, expected .* 3"),
    ],
)
def test_names_the_damage(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    damaged = IDX[:offset] + value + IDX[offset + len(value) :]
    prefix = write_bytes(tmp_path / "d", damaged, BIN)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


def test_sequences_may_lie_in_any_order(tmp_path: Path) -> None:
    idx = IDX[:46] + struct.pack("<3q", 6, 0, 2) + IDX[70:]
    dataset = IndexedDataset(write_bytes(tmp_path / "d", idx, BIN))
    assert as_documents(dataset) == [[[4, 5, 6], [1]], [[2, 3]]]


@given(damage=st.dictionaries(st.integers(0, len(IDX) - 1), st.integers(0, 255), max_size=4))
@settings(EXAMPLES, max_examples=150)
def test_damage_is_found_or_harmless(tmp_path: Path, damage: dict[int, int]) -> None:
    idx = bytearray(IDX)
    for offset, value in damage.items():
        idx[offset] = value
    prefix = write_bytes(tmp_path / "d", bytes(idx), BIN)
    with contextlib.suppress(DataError):
        dataset = IndexedDataset(prefix)
        assert sum(len(document) for document in as_documents(dataset)) == len(dataset)


def test_an_error_leaves_the_old_dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", DOCUMENTS)
    with (
        pytest.raises(RuntimeError, match="interrupted"),
        build_indexed_dataset(tmp_path / "d", "u2") as builder,
    ):
        _interrupted(builder)
    assert as_documents(IndexedDataset(tmp_path / "d")) == DOCUMENTS
    assert {path.name for path in tmp_path.iterdir()} == {"d.idx", "d.bin"}


def _interrupted(builder: IndexedDatasetBuilder) -> None:
    builder.add([7, 8], [2], [1])
    raise RuntimeError("interrupted")


def test_a_copy_in_another_process_maps_the_files(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", [[[1] * 10_000]])
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000
    assert as_documents(pickle.loads(pickled)) == as_documents(dataset)


def test_the_fingerprint_knows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "first", DOCUMENTS)
    same = write_dataset(tmp_path / "same", DOCUMENTS)
    other = write_dataset(tmp_path / "other", [[[1, 2, 3]], [[4], [5, 6]]])
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_warming_up_changes_nothing(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", DOCUMENTS)
    dataset.warm_up()
    assert as_documents(dataset) == DOCUMENTS


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "<u2"), (65499, "<u2"), (65500, "<i4")])
def test_the_number_format_of_a_vocabulary(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size).str == dtype


@given(data=st.data(), sizes=st.lists(st.lists(st.integers(0, 6), max_size=5), max_size=6))
@EXAMPLES
def test_a_document_is_read_from_anywhere(
    tmp_path: Path, data: st.DataObject, sizes: list[list[int]]
) -> None:
    numbers = count()
    documents = [[list(islice(numbers, n)) for n in lengths] for lengths in sizes]
    dataset = write_dataset(tmp_path / "d", documents)
    first = data.draw(st.integers(0, len(sizes)))
    lengths = dataset.document_lengths(range(first, len(sizes)))
    assert lengths.tolist() == [sum(lengths) for lengths in sizes[first:]]
    for number, document in enumerate(documents):
        whole = list(chain.from_iterable(document))
        offset = data.draw(st.integers(0, len(whole)))
        most = data.draw(st.integers(1, 20))
        found = dataset.read_document(number, offset, most)
        assert found.tolist() == whole[offset : offset + most]
