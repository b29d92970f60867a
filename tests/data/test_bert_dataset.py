"""Properties of BERT's samples."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data import SampleDataset, build_bert_datasets, max_predictions
from megatron.data.bert_dataset import truncate
from megatron.data.build import Splits
from megatron.errors import ConfigError, DataError
from tests.data.support import (
    EXAMPLES,
    Documents,
    data_config,
    random_documents,
    tokenizer,
    write_dataset,
)

Sample = Mapping[str, npt.NDArray[Any]]
CLS, SEP, MASK = 2, 3, 4


class Lines(list[str]):
    """What is reported."""


def build(
    directory: Path,
    documents: Documents | None = None,
    samples: tuple[int, int, int] = (200, 20, 0),
    report: Lines | None = None,
    **changes: Any,
) -> Splits:
    if documents is not None:
        write_dataset(directory / "d", documents)
    config = data_config(directory / "d", directory, **changes)
    lines = Lines() if report is None else report
    return build_bert_datasets(config, tokenizer(directory), samples, report=lines.append)


def train(directory: Path, **changes: Any) -> SampleDataset:
    """The training dataset of random documents."""
    dataset = build(directory, random_documents(40, seed=3), **changes)[0]
    assert dataset is not None
    return dataset


def original(sample: Sample) -> list[int]:
    """The tokens of a sample before masking."""
    ids = sample["input_ids"][sample["attention_mask"]].copy()
    known = sample["masked_weights"] == 1
    ids[sample["masked_positions"][known]] = sample["masked_labels"][known]
    return ids.tolist()


def segments(sample: Sample) -> tuple[list[int], list[int]]:
    """What stands between [CLS], [SEP] and [SEP]; the dataset holds no special tokens."""
    tokens = original(sample)
    first = tokens.index(SEP)
    assert tokens[0] == CLS
    assert tokens[-1] == SEP
    return tokens[1:first], tokens[first + 1 : -1]


def test_samples_have_the_layout_of_a_batch(tmp_path: Path) -> None:
    dataset = train(tmp_path)
    k = max_predictions(data_config(tmp_path / "d", tmp_path))
    assert k == 10  # 15 % of 64
    for i in range(200):
        sample = dataset[i]
        shapes = {name: (value.dtype.name, value.shape) for name, value in sample.items()}
        assert shapes == {
            "input_ids": ("int64", (64,)),
            "tokentype_ids": ("int64", (64,)),
            "attention_mask": ("bool", (64,)),
            "masked_positions": ("int64", (k,)),
            "masked_labels": ("int64", (k,)),
            "masked_weights": ("float32", (k,)),
            "is_random": ("int64", ()),
        }
        length = int(sample["attention_mask"].sum())
        assert sample["attention_mask"][:length].all()
        assert not sample["input_ids"][length:].any()
        a, b = segments(sample)
        types = [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * (64 - length)
        assert sample["tokentype_ids"].tolist() == types
        known = int(sample["masked_weights"].sum())
        assert sample["masked_weights"].tolist() == [1.0] * known + [0.0] * (k - known)
        assert 1 <= known <= k
        for name in ("masked_positions", "masked_labels"):
            assert not sample[name][known:].any()


def test_the_label_tells_whether_segments_are_in_order(tmp_path: Path) -> None:
    # Token n of a document is 5 + n: rising through a sample as long as nothing is exchanged.
    documents = [[[5 + 4 * i + j for j in range(4)] for i in range(15)]] * 20
    dataset = build(tmp_path, documents, samples=(400, 0, 0))[0]
    assert dataset is not None
    labels = []
    for i in range(400):
        sample = dataset[i]
        a, b = segments(sample)
        assert a == list(range(a[0], a[0] + len(a)))
        assert b == list(range(b[0], b[0] + len(b)))
        assert bool(sample["is_random"]) == (b[0] < a[0])
        labels.append(int(sample["is_random"]))
    assert 0.4 < np.mean(labels) < 0.6


def test_a_sample_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    dataset, again = train(tmp_path), train(tmp_path)
    for i in (0, 7, 199):
        for key, value in dataset[i].items():
            np.testing.assert_array_equal(value, again[i][key])
    other = train(tmp_path, seed=99)
    assert any((dataset[i]["input_ids"] != other[i]["input_ids"]).any() for i in range(5))


def test_epochs_mask_differently(tmp_path: Path) -> None:
    documents = [[[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18]]]
    dataset = build(tmp_path, documents, samples=(50, 0, 0), split="1", short_seq_prob=0.0)[0]
    assert dataset is not None
    masked = {tuple(dataset[i]["masked_positions"].tolist()) for i in range(50)}
    assert len(masked) > 10


def test_more_samples_keep_the_first(tmp_path: Path) -> None:
    few, many = train(tmp_path, samples=(30, 0, 0)), train(tmp_path, samples=(3000, 0, 0))
    assert (len(few), len(many)) == (30, 3000)
    for i in range(30):
        np.testing.assert_array_equal(few[i]["input_ids"], many[i]["input_ids"])
    with pytest.raises(IndexError):
        few[30]


def test_splits_hold_documents_of_their_own(tmp_path: Path) -> None:
    documents = [[[5 + d] * 4, [5 + d] * 4] for d in range(50)]  # document d is all token 5 + d
    parts = build(tmp_path, documents, samples=(200, 60, 30), split="8,1,1")
    seen = []
    for dataset in parts:
        assert dataset is not None
        seen.append({t for i in range(len(dataset)) for t in original(dataset[i])} - {CLS, SEP})
    assert seen == [set(range(5, 45)), set(range(45, 50)), set(range(50, 55))]


def test_nothing_is_built_for_a_split_that_nobody_asks_for(tmp_path: Path) -> None:
    _, valid, test = build(tmp_path, random_documents(5, seed=0), samples=(10, 0, 0), split="1")
    assert valid is None
    assert test is None


def test_without_a_binary_head_there_is_one_segment(tmp_path: Path) -> None:
    documents = [[[5 + i for i in range(40)]]] * 20
    dataset = build(
        tmp_path, documents, samples=(50, 0, 0), bert_no_binary_head=True, short_seq_prob=0.0
    )[0]
    assert dataset is not None
    for i in range(50):
        sample = dataset[i]
        assert original(sample) == [CLS, *range(5, 45), SEP]
        assert not sample["tokentype_ids"].any()
        assert sample["is_random"] == 0


def test_documents_of_one_sentence_are_counted(tmp_path: Path) -> None:
    pairs, single = random_documents(30, seed=1), random_documents(10, seed=2, sentences=(1, 2))
    report = Lines()
    build(tmp_path, [*pairs, *single], (10, 0, 0), report, split="1")
    assert len(report) == 1
    assert "10 of 40 documents skipped because they hold a single sentence" in report[0]


def test_only_documents_of_one_sentence_is_an_error(tmp_path: Path) -> None:
    documents = random_documents(10, seed=2, sentences=(1, 2))
    with pytest.raises(DataError, match="10 of 10 documents skipped .*--split-sentences") as caught:
        build(tmp_path, documents, split="1", samples=(5, 0, 0))
    assert len(caught.value.problems) == 1


def test_an_empty_training_split_is_an_error(tmp_path: Path) -> None:
    message = r"--split '0,1' leaves no document for train.* 5 doc"
    with pytest.raises(DataError, match=message):
        build(tmp_path, random_documents(5, seed=0), (5, 0, 0), split="0,1")


def test_empty_splits_for_evaluation_are_reported_and_left_out(tmp_path: Path) -> None:
    report = Lines()
    documents = [*random_documents(5, seed=0), *random_documents(1, seed=2, sentences=(1, 2))]
    train, valid, test = build(tmp_path, documents, (5, 5, 5), report, split="5,0,1")
    assert train is not None and valid is None and test is None
    assert len(report) == 3
    assert "valid: skipped, since --split '5,0,1' leaves no document for valid" in report[1]
    assert "test: skipped" in report[2] and "hold a single sentence" in report[2]


def test_a_token_outside_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    documents = [[[5, 6], [7, 100, 8]], [[300], [9]]]
    message = r"d\.bin: token 3 \(byte 6\) is 100, outside the vocabulary of 100 tokens"
    for _ in range(2):  # found anew and found in the cache
        with pytest.raises(DataError, match=message):
            build(tmp_path, documents, split="1", samples=(5, 0, 0))
    write_dataset(tmp_path / "d", [[[5, 6], [7, 99, 8]], [[99], [9]]])  # the same sizes
    assert build(tmp_path, split="1", samples=(5, 0, 0))[0] is not None


def test_negative_and_fractional_tokens_are_errors(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", [[[5, -1], [7]]], "i4")
    with pytest.raises(DataError, match=r"token 1 \(byte 4\) is -1"):
        build(tmp_path, split="1", samples=(5, 0, 0))
    write_dataset(tmp_path / "d", [[[5, 1], [7]]], "f4")
    with pytest.raises(DataError, match="tokens are float32, expected whole numbers"):
        build(tmp_path, split="1", samples=(5, 0, 0))


def test_a_sequence_too_short_for_pairs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--seq-length 4 is too short"):
        train(tmp_path, seq_length=4)
    assert len(original(train(tmp_path, seq_length=5)[0])) == 5


def test_a_prefix_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data-path: expected the prefix of a dataset"):
        build(tmp_path, data_path=())


def test_empty_sentences_do_no_harm(tmp_path: Path) -> None:
    documents = [[[], [5, 6]], [[], []], [[7], []], [[8, 9, 10], [], [11]]]
    dataset = build(tmp_path, documents, split="1", samples=(40, 0, 0))[0]
    assert dataset is not None
    for i in range(40):
        assert original(dataset[i])[0] == CLS


def test_a_copy_in_another_process_gives_the_same(tmp_path: Path) -> None:
    dataset = train(tmp_path)
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy[11]["input_ids"], dataset[11]["input_ids"])


def test_index_files_lie_beside_the_data_by_default(tmp_path: Path) -> None:
    build(tmp_path, random_documents(5, seed=0), split="1", data_cache_dir=None, samples=(5, 0, 0))
    assert list((tmp_path / "index-cache").glob("d_sentences_*.npy"))


def test_changing_the_split_changes_the_index(tmp_path: Path) -> None:
    documents = random_documents(40, seed=3)
    for split in ("8,2", "5,5", "8,2"):
        build(tmp_path, documents, split=split)
    assert len(list((tmp_path / "cache").glob("*.npy"))) >= 4


@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=2),
    target=st.integers(2, 60),
    seed=st.integers(0, 2**32),
)
@EXAMPLES
def test_truncation_keeps_a_stretch_of_each(lengths: list[int], target: int, seed: int) -> None:
    parts = [np.arange(length) for length in lengths]
    kept = truncate(parts, target, np.random.default_rng(seed))
    assert sum(map(len, kept)) == min(target, sum(lengths))
    for before, after in zip(parts, kept, strict=True):
        assert np.array_equal(
            after, np.arange(after[0], after[0] + len(after)) if len(after) else after
        )
        assert len(after) >= min(len(before), target // 2)  # the longer one gives way
    if len(kept) == 2 and len(kept[0]) < lengths[0] and len(kept[1]) < lengths[1]:
        assert abs(len(kept[0]) - len(kept[1])) <= 1


def test_truncation_takes_from_both_ends() -> None:
    firsts = [
        truncate([np.arange(100)], 50, np.random.default_rng(seed))[0][0] for seed in range(400)
    ]
    assert 23 < np.mean(firsts) < 27
