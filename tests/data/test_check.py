"""Large datasets are looked at here and there, small ones as a whole."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import IndexedDataset, build_indexed_dataset, indexed_dataset
from megatron.data.build import Source
from megatron.data.gpt_build import GPTRule
from megatron.data.indexed_dataset import pieces
from megatron.data.sample_map import build_sentence_map, holds_sentences
from megatron.data.token_check import look_at_tokens
from megatron.errors import DataError
from tests.data.support import EXAMPLES, data_config

PIECE, MANY = 8, 800


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_dataset, "PIECE", PIECE)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A dataset of many documents of one sentence of two tokens."""
    with build_indexed_dataset(tmp_path / "d", "u2") as builder:
        builder.add(np.full(2 * MANY, 5), [2] * MANY, [1] * MANY)
    return tmp_path / "d"


@given(length=st.integers(0, 300), most=st.none() | st.integers(0, 400))
@EXAMPLES
def test_pieces_are_the_whole_or_spread_over_it(length: int, most: int | None) -> None:
    found = list(pieces(length, most))
    covered = [place for piece in found for place in piece]
    assert covered == sorted(set(covered)) and all(0 < len(piece) <= PIECE for piece in found)
    if most is None or most >= length:
        assert covered == list(range(length))
    else:
        assert covered[0] == 0 and covered[-1] == length - 1
        assert len(covered) <= max(most + PIECE, 2 * PIECE)
        gaps = np.diff([piece.start for piece in found])
        assert gaps.max(initial=0) - gaps.min(initial=length) <= PIECE


@pytest.mark.parametrize("place", [0, 3, MANY - 1])
def test_damage_is_found_where_is_looked(prefix: Path, place: int) -> None:
    idx = prefix.with_suffix(".idx")
    content = bytearray(idx.read_bytes())
    at = 34 + 4 * MANY + 8 * place
    content[at : at + 8] = struct.pack("<q", 1 << 40)
    idx.write_bytes(content)
    for most in (None, 4 * PIECE):
        with pytest.raises(DataError, match=rf"offset {at} places sequence {place} at bytes"):
            IndexedDataset(prefix, most=most)


def test_a_truncated_file_is_found_with_one_look(prefix: Path) -> None:
    tokens = prefix.with_suffix(".bin")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"within the {4 * MANY - 2} bytes .* have {4 * MANY}"):
        IndexedDataset(prefix, most=2 * PIECE)


def test_tokens_are_looked_at_here_and_there(prefix: Path) -> None:
    tokens = np.full(2 * MANY, 5, "<u2")
    tokens[PIECE + 1] = 9  # between the first stretch and the next that is looked at
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    dataset = IndexedDataset(prefix, most=2 * PIECE)
    look_at_tokens(dataset, 9, most=2 * PIECE)
    with pytest.raises(DataError, match=rf"token {PIECE + 1} \(byte {2 * PIECE + 2}\) is 9, outs"):
        look_at_tokens(dataset, 9)
    tokens[-1] = 9
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    with pytest.raises(DataError, match=rf"token {2 * MANY - 1} "):
        look_at_tokens(IndexedDataset(prefix, most=2 * PIECE), 9, most=2 * PIECE)


@given(documents=st.lists(st.integers(0, 30), min_size=1, max_size=9), data=st.data())
@settings(EXAMPLES, max_examples=30)
def test_tokens_are_counted_until_there_are_enough(
    tmp_path: Path, documents: list[int], data: st.DataObject
) -> None:
    with build_indexed_dataset(tmp_path / "d", "u2") as builder:
        builder.add(np.zeros(sum(documents)), [1] * sum(documents), documents)
    dataset = IndexedDataset(tmp_path / "d")
    first = data.draw(st.integers(0, len(documents)))
    part = range(first, data.draw(st.integers(first, len(documents))))
    tokens = sum(documents[part.start : part.stop])
    assert dataset.count_tokens(part) == tokens
    enough = data.draw(st.integers(0, 100))
    counted = dataset.count_tokens(part, enough=enough)
    assert min(tokens, enough) <= counted <= tokens


@given(
    documents=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    part=st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted),
    least=st.integers(1, 3),
)
@settings(EXAMPLES, max_examples=60)
def test_documents_without_sentences_are_those_of_an_empty_map(
    tmp_path: Path, documents: list[int], part: list[int], least: int
) -> None:
    with build_indexed_dataset(tmp_path / "d", "u2") as builder:
        builder.add(np.zeros(sum(documents)), [1] * sum(documents), documents)
    dataset = IndexedDataset(tmp_path / "d")
    chosen = range(len(documents))[part[0] : part[1]]
    samples, _ = build_sentence_map(
        dataset,
        chosen,
        samples=1,
        max_tokens=8,
        min_sentences=least,
        short_seq_prob=0.1,
        seed=1,
        cache_dir=tmp_path / "cache",
    )
    assert holds_sentences(dataset, chosen, least) == (len(samples) > 0)


@pytest.mark.parametrize(("tokens", "lacks"), [(16, True), (17, False), (40, False)])
def test_one_sample_of_gpt_takes_a_token_more_than_its_length(
    tmp_path: Path, tokens: int, lacks: bool
) -> None:
    with build_indexed_dataset(tmp_path / "d", "u2") as builder:
        builder.add(np.zeros(tokens), [1] * tokens, [1] * tokens)
    config = data_config(tmp_path / "d", tmp_path, seq_length=16, model_type="gpt", split="1")
    source = Source.of(config, 1.0, IndexedDataset(tmp_path / "d"))
    assert (GPTRule(config).lacks(source.parts[0]) is not None) == lacks
