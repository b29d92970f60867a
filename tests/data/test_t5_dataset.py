"""Properties of T5's samples."""

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megatron.data.samples import SampleDataset
from megatron.data.t5_build import build_t5_datasets
from megatron.data.t5_dataset import T5Dataset
from megatron.errors import ConfigError, DataError
from megatron.tokenizer import Tokenizer, load_sentence_piece
from tests.data.support import (
    Documents,
    data_config,
    random_documents,
    tokenizer,
    write_dataset,
)
from tests.tokenizer.support import train_model

PAD, CLS = 0, 2
WORDS, SENTINELS = 100, 20  # tokens of text; behind them the sentinels
S, D = 64, 24

Sample = dict[str, npt.NDArray[Any]]


class Lines(list[str]):
    """What is reported."""


def build(
    directory: Path,
    documents: Documents | None = None,
    samples: tuple[int, int, int] = (200, 0, 0),
    report: Lines | None = None,
    vocabulary: Tokenizer | None = None,
    **changes: Any,
) -> tuple[SampleDataset | None, SampleDataset | None, SampleDataset | None]:
    if documents is not None:
        write_dataset(directory / "d", documents)
    flags = {"seq_length": S, "decoder_seq_length": D, "split": "1", **changes}
    config = data_config(directory / "d", directory, **flags)
    vocabulary = vocabulary or tokenizer(directory).with_sentinels(SENTINELS)
    lines = Lines() if report is None else report
    return build_t5_datasets(config, vocabulary, samples, report=lines.append)


def train(directory: Path, documents: Documents | None = None, **changes: Any) -> T5Dataset:
    """The training dataset, of random documents where none are given."""
    dataset = build(directory, documents or random_documents(40, seed=3), **changes)[0]
    assert isinstance(dataset, T5Dataset)
    return dataset


def text_of(sample: Sample) -> list[int]:
    """The tokens of a sample before spans were taken out."""
    labels = sample["labels"][sample["loss_weights"] == 1].tolist()
    places = [i for i, token in enumerate(labels) if token >= WORDS]
    spans = {labels[a]: labels[a + 1 : b] for a, b in itertools.pairwise(places)}
    encoder = sample["encoder_ids"][sample["encoder_mask"]].tolist()
    return [t for token in encoder for t in (spans[token] if token >= WORDS else [token])]


def test_samples_have_the_layout_of_a_batch(tmp_path: Path) -> None:
    dataset = train(tmp_path)
    assert len(dataset) == 200
    for i in range(200):
        sample = dataset[i]
        shapes = {name: (value.dtype.name, value.shape) for name, value in sample.items()}
        assert shapes == {
            "encoder_ids": ("int64", (S,)),
            "decoder_ids": ("int64", (D,)),
            "labels": ("int64", (D,)),
            "loss_weights": ("float32", (D,)),
            "encoder_mask": ("bool", (S,)),
        }
        tokens, labels = int(sample["encoder_mask"].sum()), int(sample["loss_weights"].sum())
        assert sample["encoder_mask"][:tokens].all()
        assert sample["loss_weights"][:labels].all()
        assert (sample["encoder_ids"][tokens:] == PAD).all()
        assert (sample["decoder_ids"][labels:] == PAD).all()
        assert (sample["labels"][labels:] == PAD).all()
        assert set(sample["loss_weights"].tolist()) <= {0.0, 1.0}
        assert sample["decoder_ids"][0] == CLS
        assert np.array_equal(sample["decoder_ids"][1:labels], sample["labels"][: labels - 1])
        assert sample["labels"][0] == WORDS  # the first sentinel
        assert sample["labels"][labels - 1] >= WORDS


def test_samples_are_stretches_of_documents(tmp_path: Path) -> None:
    documents = random_documents(40, seed=3)
    dataset = train(tmp_path, documents, short_seq_prob=0.3)
    whole = [[token for sentence in document for token in sentence] for document in documents]
    for i in range(200):
        text = text_of(dataset[i])
        assert any(
            text == tokens[a : a + len(text)] for tokens in whole for a in range(len(tokens))
        )


def test_long_documents_fill_the_encoder(tmp_path: Path) -> None:
    documents = [[[5 + (i + j) % 60 for j in range(10)] for i in range(40)]] * 5
    dataset = train(tmp_path, documents, short_seq_prob=0.0)
    lengths = [int(dataset[i]["encoder_mask"].sum()) for i in range(20)]
    assert np.mean(np.array(lengths) >= S - 1) > 0.5
    noise = [
        int(sum(dataset[i]["labels"][dataset[i]["loss_weights"] > 0] < WORDS)) for i in range(20)
    ]
    texts = [len(text_of(dataset[i])) for i in range(20)]
    assert max(texts) == 71
    assert abs(sum(noise) / sum(texts) - 0.15) < 0.01


def test_a_short_decoder_is_filled_and_not_exceeded(tmp_path: Path) -> None:
    documents = [[[5 + (i + j) % 60 for j in range(10)] for i in range(40)]] * 5
    for decoder_seq_length in (3, 4, 7, 13):
        dataset = train(tmp_path, documents, decoder_seq_length=decoder_seq_length)
        filled = []
        for i in range(30):
            sample = dataset[i]
            assert len(sample["labels"]) == decoder_seq_length
            assert len(text_of(sample)) >= 2  # every sentinel of the encoder is explained
            filled.append(int(sample["loss_weights"].sum()))
        assert max(filled) >= decoder_seq_length - 1


def test_the_decoder_is_as_long_as_the_encoder_by_default(tmp_path: Path) -> None:
    dataset = train(tmp_path, decoder_seq_length=None)
    assert dataset[0]["labels"].shape == (S,)


def test_a_sample_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    dataset, again = train(tmp_path), train(tmp_path, samples=(1000, 0, 0))
    for i in (0, 7, 199):
        for key, value in dataset[i].items():
            np.testing.assert_array_equal(value, again[i][key])
    other = train(tmp_path, seed=99)
    assert any((dataset[i]["encoder_ids"] != other[i]["encoder_ids"]).any() for i in range(5))
    with pytest.raises(IndexError):
        dataset[200]


def test_epochs_take_out_other_spans(tmp_path: Path) -> None:
    dataset = train(tmp_path, [[list(range(5, 25)), list(range(25, 45))]], short_seq_prob=0.0)
    assert len({tuple(dataset[i]["labels"].tolist()) for i in range(50)}) > 30
    assert {tuple(text_of(dataset[i])) for i in range(50)} == {tuple(range(5, 45))}


def test_documents_of_one_sentence_are_used(tmp_path: Path) -> None:
    report = Lines()
    documents = random_documents(10, seed=2, sentences=(1, 2))
    dataset = train(tmp_path, documents, report=report, samples=(50, 0, 0), short_seq_prob=0.0)
    assert report == ["train: 10 documents, 10 samples an epoch, 5.00 epochs"]
    seen = {tuple(text_of(dataset[i])) for i in range(50)}
    assert seen == {tuple(document[0]) for document in documents}


def test_sentences_longer_than_a_sample_are_counted(tmp_path: Path) -> None:
    report = Lines()
    documents = [[[7] * 71], [[7] * 72], [[7] * 3, [8] * 500]]
    train(tmp_path, documents, report=report)
    assert "; 2 of 4 sentences are longer than the 71 tokens of a sample" in report[0]


def test_tiny_and_empty_texts_do_no_harm(tmp_path: Path) -> None:
    dataset = train(tmp_path, [[[]], [[5]], [[], []], [[6, 7]]])
    for i in range(40):
        sample = dataset[i]
        assert sample["encoder_mask"].any()
        assert sample["loss_weights"].any()
        assert text_of(sample) in ([PAD], [5], [6, 7])


def test_splits_hold_documents_of_their_own(tmp_path: Path) -> None:
    documents = [[[5 + d] * 4, [5 + d] * 4] for d in range(50)]  # document d is all token 5 + d
    seen = []
    for dataset in build(tmp_path, documents, (200, 60, 30), split="8,1,1"):
        assert dataset is not None
        seen.append({t for i in range(len(dataset)) for t in text_of(dict(dataset[i]))})
    assert seen == [set(range(5, 45)), set(range(45, 50)), set(range(50, 55))]


def test_too_few_sentinels_are_named_with_how_many_there_must_be(tmp_path: Path) -> None:
    documents = random_documents(5, seed=0)
    plain = tokenizer(tmp_path)
    for count in (0, 4):
        message = (
            f"--vocab-extra-ids {count}: T5 needs at least 5 for --seq-length 64, "
            "--mask-prob 0.15 and --mean-span-length 3"
        )
        with pytest.raises(ConfigError, match=message):
            build(tmp_path, documents, vocabulary=plain.with_sentinels(count))
    assert train(tmp_path, documents, vocabulary=plain.with_sentinels(5))[0] is not None


def test_a_corpus_with_sentinels_is_refused(tmp_path: Path) -> None:
    message = r"token 2 \(byte 4\) is 100, outside the vocabulary of 100 tokens"
    with pytest.raises(DataError, match=message):
        build(tmp_path, [[[5, 6], [WORDS, 7]]])


def test_lengths_that_hold_no_sample_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--decoder-seq-length 2 is too short"):
        train(tmp_path, decoder_seq_length=2)
    assert len(text_of(train(tmp_path, seq_length=2, decoder_seq_length=3)[0])) == 2


def test_a_copy_in_another_process_gives_the_same(tmp_path: Path) -> None:
    dataset = train(tmp_path)
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy[11]["labels"], dataset[11]["labels"])


def test_a_model_of_sentence_pieces_serves(tmp_path: Path) -> None:
    # As the published T5: no beginning, so that a decoder starts from the padding.
    model = train_model(tmp_path, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    pieces = load_sentence_piece(model)
    dataset = train(tmp_path, [[list(range(5, 45))]], vocabulary=pieces.with_sentinels(10))
    sample = dataset[0]
    assert sample["decoder_ids"][0] == 0
    assert sample["labels"][0] == pieces.vocab_size
