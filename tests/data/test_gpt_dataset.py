"""Properties of GPT's samples."""

import dataclasses
import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import SampleDataset, build_gpt_datasets
from megatron.data.build import Splits
from megatron.errors import ConfigError, DataError
from megatron.tokenizer import Tokenizer
from tests.data.support import EXAMPLES, Documents, data_config, tokenizer, write_dataset

EOD = 3  # of the vocabulary to test with
DATA = "d"


def build(
    directory: Path,
    samples: tuple[int, int, int] = (50, 0, 0),
    report: list[str] | None = None,
    words: Tokenizer | None = None,
    **changes: Any,
) -> Splits:
    config = data_config(directory / DATA, directory, **{"split": "1", **changes})
    lines: list[str] = [] if report is None else report
    return build_gpt_datasets(config, words or tokenizer(directory), samples, report=lines.append)


def train(directory: Path, documents: Documents, samples: int, **changes: Any) -> SampleDataset:
    """The training dataset of all documents."""
    write_dataset(directory / DATA, documents, "i4")
    dataset = build(directory, (samples, 0, 0), **changes)[0]
    assert dataset is not None and len(dataset) == samples
    return dataset


def text(dataset: SampleDataset, samples: Sequence[int]) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in samples]


def documents_of(lengths: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Documents of sentences of such lengths, of random tokens that end none."""
    random = np.random.default_rng(len(lengths))
    return [[random.integers(5, 100, size).tolist() for size in sizes] for sizes in lengths]


sentences = st.lists(st.integers(0, 7), max_size=4)
corpora = st.lists(sentences, min_size=1, max_size=12).filter(lambda c: sum(map(sum, c)) > 1)


def numbered(lengths: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """The documents with every token's number in the corpus in its place."""
    count = itertools.count()
    return [[list(itertools.islice(count, size)) for size in sizes] for sizes in lengths]


class Numbers:
    """What the builder asks a tokenizer for, of a vocabulary that is large enough."""

    type = "numbers"
    vocab_size = 1 << 20
    eod = None


@given(lengths=corpora, data=st.data(), seed=st.integers(0, 2**32))
@settings(EXAMPLES, max_examples=60)
def test_every_token_is_predicted_once_an_epoch(
    tmp_path: Path, lengths: list[list[int]], data: st.DataObject, seed: int
) -> None:
    documents = numbered(lengths)
    tokens = sum(map(sum, lengths))
    s = data.draw(st.integers(1, tokens - 1))
    epochs = data.draw(st.integers(1, 4))
    whole = (epochs * tokens - 1) // s  # samples whose last token lies within these epochs
    dataset = train(tmp_path, documents, whole, seq_length=s, seed=seed, words=Numbers())
    samples = text(dataset, range(whole))
    assert all(len(sample) == s + 1 for sample in samples)
    labels = np.bincount([token for sample in samples for token in sample[1:]], minlength=tokens)
    # All but the very first token, and at the end a rest that waits for the epoch after.
    rest = (epochs * tokens - 1) % s
    assert labels.sum() == epochs * tokens - 1 - rest
    assert (labels <= epochs).all()
    assert (labels >= epochs - 2).all()
    assert (labels == epochs).sum() >= tokens - 1 - rest


@given(lengths=corpora, data=st.data(), seed=st.integers(0, 2**32))
@settings(EXAMPLES, max_examples=60)
def test_samples_are_cut_from_one_stream(
    tmp_path: Path, lengths: list[list[int]], data: st.DataObject, seed: int
) -> None:
    documents = numbered(lengths)
    tokens = sum(map(sum, lengths))
    s = data.draw(st.integers(1, tokens - 1))
    dataset = train(tmp_path, documents, 5 * tokens // s, seq_length=s, seed=seed, words=Numbers())
    sample_map, order = dataset._samples, dataset._order  # type: ignore[attr-defined]
    flat = [[token for sentence in document for token in sentence] for document in documents]
    places = [int(order[place][0]) for place in range(len(order))]
    for epoch in range(len(places) // len(flat)):
        shuffled = places[epoch * len(flat) : (epoch + 1) * len(flat)]
        assert sorted(shuffled) == list(range(len(flat))), "an epoch holds every document once"
    stream = [token for place in places for token in flat[place]]
    before = np.cumsum([0, *(len(flat[place]) for place in places)])
    first, seen = 0, []
    for i in range(len(dataset)):
        place, offset = sample_map[i].tolist()
        assert 0 <= offset < len(flat[places[place]])
        start = int(before[place]) + offset
        assert text(dataset, [i])[0] == stream[start : start + s + 1]
        seen.append(start // s)
        assert start % s == 0
    for epoch in itertools.count():
        end = ((epoch + 1) * tokens - 1) // s
        if end > len(seen):
            break
        assert sorted(seen[first:end]) == list(range(first, end)), "an epoch's samples, shuffled"
        first = end
    assert first > 0


def test_samples_run_on_through_documents_shorter_and_longer(tmp_path: Path) -> None:
    documents = documents_of([[3], [0], [40, 2], [], [1], [90]])
    dataset = train(tmp_path, documents, 400, seq_length=16)
    flat = [list(itertools.chain.from_iterable(document)) for document in documents]
    stretches = {tuple(d[i : i + 2]) for d in flat for i in range(len(d) - 1)}
    ends = {(a[-1], b[0]) for a in flat for b in flat if a and b}
    for sample in text(dataset, range(400)):
        assert set(itertools.pairwise(sample)) <= stretches | ends


def test_one_document_is_enough(tmp_path: Path) -> None:
    document = list(range(5, 70))
    dataset = train(tmp_path, [[document]], 40, seq_length=32)
    for sample in text(dataset, range(40)):
        steps = np.diff(sample)
        assert ((steps == 1) | (steps == 5 - 69)).all()
    assert sorted(text(dataset, range(2))) == [document[:33], document[32:65]]


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path: Path) -> None:
    documents = documents_of([[20]] * 30)
    one, two = (train(tmp_path, documents, 150, seq_length=10, seed=seed) for seed in (1, 2))
    starts = [text(one, range(60))[i] for i in range(60)], text(one, range(60, 120))
    assert starts[0] != starts[1]
    assert text(one, range(60)) != text(two, range(60))
    again = train(tmp_path, documents, 150, seq_length=10, seed=1)
    assert text(again, range(150)) == text(one, range(150))


def test_more_samples_keep_the_first(tmp_path: Path) -> None:
    documents = documents_of([[20, 3], [7], [31]])
    few = train(tmp_path / "few", documents, 5, seq_length=10)
    many = train(tmp_path / "many", documents, 700, seq_length=10)
    assert text(few, range(5)) == text(many, range(5))
    with pytest.raises(IndexError):
        few[5]
    for kind in ("tokens", "order"):
        names = {path.name for path in (tmp_path / "few/cache").glob(f"d_{kind}_*.npy")}
        assert names < {path.name for path in (tmp_path / "many/cache").glob(f"d_{kind}_*.npy")}


def test_splits_share_no_document(tmp_path: Path) -> None:
    # Of sentences, too: a split never cuts a document.
    write_dataset(tmp_path / DATA, [[[5 + d] * 4, [5 + d] * 4] for d in range(50)])
    parts = build(tmp_path, (200, 60, 30), split="8,1,1", seq_length=16)
    seen = []
    for dataset in parts:
        assert dataset is not None
        seen.append({t for sample in text(dataset, range(len(dataset))) for t in sample})
    assert seen == [set(range(5, 45)), set(range(45, 50)), set(range(50, 55))]


def test_sentences_and_whole_documents_give_the_same(tmp_path: Path) -> None:
    sentences = documents_of([[4, 0, 9], [30], [2, 2, 2, 2], [0, 0], [25, 1]])
    whole = [[list(itertools.chain.from_iterable(document))] for document in sentences]
    one = train(tmp_path / "a", sentences, 60, seq_length=12)
    other = train(tmp_path / "b", whole, 60, seq_length=12)
    assert text(one, range(60)) == text(other, range(60))


def test_a_copy_in_another_process_gives_the_same(tmp_path: Path) -> None:
    dataset = train(tmp_path, documents_of([[20], [31]]), 40, seq_length=10)
    copy = pickle.loads(pickle.dumps(dataset))
    assert text(copy, range(40)) == text(dataset, range(40))


def test_samples_have_the_layout_of_a_batch(tmp_path: Path) -> None:
    documents = documents_of([[20], [31]])
    plain = train(tmp_path, documents, 9, seq_length=10)[3]
    shapes = {name: (value.dtype.name, value.shape) for name, value in plain.items()}
    assert shapes == {"tokens": ("int64", (11,)), "loss_weights": ("float32", (10,))}
    assert (plain["loss_weights"] == 1).all()
    options = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    full = train(tmp_path, documents, 9, seq_length=10, **options)[3]
    shapes = {name: (value.dtype.name, value.shape) for name, value in full.items()}
    assert shapes == {
        "tokens": ("int64", (11,)),
        "loss_weights": ("float32", (10,)),
        "position_ids": ("int64", (10,)),
        "document_lengths": ("int64", (10,)),
    }
    np.testing.assert_array_equal(plain["tokens"], full["tokens"])


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("reset_position_ids", "position_ids"),
        ("reset_attention_mask", "document_lengths"),
        ("eod_mask_loss", None),
    ],
)
def test_each_option_adds_its_own_field(tmp_path: Path, option: str, field: str | None) -> None:
    dataset = train(tmp_path, [[[5, 6, EOD]]] * 9, 20, seq_length=8, **{option: True})
    assert set(dataset[0]) == {"tokens", "loss_weights"} | ({field} if field else set())
    masked = any((dataset[i]["loss_weights"] == 0).any() for i in range(20))
    assert masked == (option == "eod_mask_loss")


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), s=st.integers(1, 8))
@settings(EXAMPLES, max_examples=60)
def test_a_document_ends_with_its_token(tmp_path: Path, lengths: list[int], s: int) -> None:
    documents = [[[*range(5, 4 + length), EOD]] for length in lengths] * 3
    options = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    for sample in train_samples(tmp_path, documents, 40, seq_length=s, **options):
        tokens = sample["tokens"].tolist()[:-1]
        numbers = [0, *itertools.accumulate(token == EOD for token in tokens[:-1])]
        positions = [n - numbers.index(numbers[n]) for n in range(s)]
        assert sample["position_ids"].tolist() == positions
        counts = np.bincount(numbers, minlength=s).tolist()
        assert sample["document_lengths"].tolist() == counts
        assert sample["loss_weights"].tolist() == [float(token != EOD) for token in tokens]


def train_samples(
    directory: Path, documents: Documents, samples: int, **changes: Any
) -> list[dict[str, npt.NDArray[Any]]]:
    if (
        sum(len(sentence) for document in documents for sentence in document)
        <= changes["seq_length"]
    ):
        return []
    dataset = train(directory, documents, samples, **changes)
    return [dict(dataset[i]) for i in range(samples)]


def test_a_tokenizer_without_the_token_is_an_error(tmp_path: Path) -> None:
    words = tokenizer(tmp_path)
    special = {role: token for role, token in words.special.items() if role != "eod"}
    without = dataclasses.replace(words, special=special)
    write_dataset(tmp_path / DATA, documents_of([[90]]))
    message = "--reset-position-ids, --eod-mask-loss: --tokenizer-type BertWordPieceLowerCase has"
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, words=without, reset_position_ids=True, eod_mask_loss=True)
    assert build(tmp_path, words=without)[0] is not None


def test_documents_without_the_token_are_reported(tmp_path: Path) -> None:
    documents = documents_of([[90]] * 5)
    write_dataset(tmp_path / DATA, documents)
    report: list[str] = []
    build(tmp_path, report=report, eod_mask_loss=True)
    build(tmp_path, report=report)
    write_dataset(tmp_path / DATA, [[[*document[0], EOD]] for document in documents])
    build(tmp_path, report=report, eod_mask_loss=True)
    missing = "documents do not end with token 3, so that --eod-mask-loss has no effect"
    assert [missing in line for line in report] == [True, False, False]


@pytest.mark.parametrize("tokens", [0, 1, 16])
def test_too_few_tokens_for_a_sample_is_an_error(tmp_path: Path, tokens: int) -> None:
    write_dataset(tmp_path / DATA, documents_of([[tokens], []]))
    message = rf"2 documents for train hold no sample: {tokens} tokens, --seq-length 16 needs 17"
    with pytest.raises(DataError, match=message):
        build(tmp_path, seq_length=16)
    write_dataset(tmp_path / DATA, documents_of([[17], []]))
    assert build(tmp_path, seq_length=16)[0] is not None


def test_empty_splits_for_evaluation_are_reported_and_left_out(tmp_path: Path) -> None:
    write_dataset(tmp_path / DATA, documents_of([[90], [3]]))
    report: list[str] = []
    train, valid, test = build(tmp_path, (5, 5, 5), report, split="1,1,0", seq_length=16)
    assert train is not None and valid is None and test is None
    assert report[0].startswith("train: 1 documents, 6 samples an epoch, 0.89 epochs")
    assert "valid: skipped, since" in report[1] and "3 tokens, --seq-length 16 needs" in report[1]
    assert "test: skipped, since --split '1,1,0' leaves no document for test" in report[2]


def test_a_token_outside_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    write_dataset(tmp_path / DATA, [[[5, 6, 100, 7]]])
    with pytest.raises(DataError, match="token 2 .* is 100, outside the vocabulary of 100 tokens"):
        build(tmp_path, seq_length=2)
