"""Vocabularies on their way there load in stock `transformers` and cut texts as ours do."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron.checkpoint.hugging_face.tokenizer import (
    find_tokenizer,
    special_token_ids,
    write_tokenizer,
)
from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from megatron.tokenizer import Tokenizer, load_byte_level, load_sentence_piece, load_wordpiece

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "the", "cat", "s", "##at", "on", "."]
LETTERS = "abcdefgh"


def model_of(model_type: str) -> ModelConfig:
    return ModelConfig(
        model_type=model_type,
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        max_position_embeddings=64,
    )


def wordpiece(directory: Path, *, lower_case: bool) -> Tokenizer:
    file = directory / "vocab.txt"
    file.write_text("\n".join(WORDS) + "\n")
    return load_wordpiece(file, lower_case=lower_case)


def byte_level(directory: Path) -> Tokenizer:
    pieces = [*LETTERS, "Ġ", ".", "Ġa", "bc", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (directory / "merges.txt").write_text("#version: 0.2\nĠ a\nb c\n")
    return load_byte_level(directory / "vocab.json", directory / "merges.txt")


def texts(count: int = 200) -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 6))) for _ in range(60)]
    return [" ".join(rng.choices(words, k=10)) for _ in range(count)]


def sentence_piece(directory: Path, kind: str) -> Tokenizer:
    package = pytest.importorskip("sentencepiece")
    tokens = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if kind == "unigram" else {}
    package.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()),
        model_prefix=str(directory / "m"),
        model_type=kind,
        vocab_size=60,
        num_threads=1,
        minloglevel=2,
        **tokens,
    )
    return load_sentence_piece(directory / "m.model")


@pytest.mark.parametrize("lower_case", [False, True])
def test_wordpiece(lower_case: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "own").mkdir()
    ours = wordpiece(tmp_path / "own", lower_case=lower_case)
    assert write_tokenizer(tmp_path, ours, model_of("bert")) == []
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The cat sat on the Cat."
    assert theirs(text, add_special_tokens=False).input_ids == ours.tokenize(text)
    assert theirs.model_max_length == 64

    found = find_tokenizer(tmp_path)
    assert found.type == ours.type
    assert found.files == {"vocab_file": tmp_path / "vocab.txt"}


def test_byte_level(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "own").mkdir()
    ours = byte_level(tmp_path / "own")
    assert write_tokenizer(tmp_path, ours, model_of("gpt")) == []
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("abc a.").input_ids == ours.tokenize("abc a.")
    found = find_tokenizer(tmp_path)
    assert found.type == "GPT2BPETokenizer"
    assert set(found.files) == {"vocab_file", "merge_file"}


@pytest.mark.parametrize(
    ("kind", "name", "file"),
    [("unigram", "T5Tokenizer", "spiece.model"), ("bpe", "LlamaTokenizer", "tokenizer.model")],
)
def test_sentence_piece(kind: str, name: str, file: str, tmp_path: Path) -> None:
    """Sentinels keep the ids that they have here, of which theirs alone would count down."""
    transformers = pytest.importorskip("transformers")
    ours = sentence_piece(tmp_path, kind).with_sentinels(7)
    (note,) = write_tokenizer(tmp_path, ours, model_of("t5"))
    assert name in note
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(20):
        assert theirs(text, add_special_tokens=False).input_ids == ours.tokenize(text)
    ids = [theirs.convert_tokens_to_ids(f"<extra_id_{number}>") for number in range(7)]
    assert ids == list(ours.sentinels)
    found = find_tokenizer(tmp_path)
    assert found.type == "SentencePieceTokenizer"
    assert found.files == {"tokenizer_model": tmp_path / file}
    assert bool(found.notes) == (kind == "unigram")


def test_special_tokens_of_each_kind_of_network(tmp_path: Path) -> None:
    ours = wordpiece(tmp_path, lower_case=True)
    assert special_token_ids(ours, model_of("bert")) == {"pad_token_id": 0}
    assert special_token_ids(ours, model_of("gpt")) == {"bos_token_id": 2, "eos_token_id": 3}
    assert special_token_ids(ours, model_of("t5")) == {
        "pad_token_id": 0,
        "eos_token_id": 3,
        "decoder_start_token_id": 2,
    }


def test_a_vocabulary_without_settings_is_lower_cased_as_theirs_is(tmp_path: Path) -> None:
    wordpiece(tmp_path, lower_case=False)
    assert find_tokenizer(tmp_path).type == "BertWordPieceLowerCase"
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert find_tokenizer(tmp_path).type == "BertWordPieceCase"


def test_what_is_no_tokenizer_of_ours(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path).notes == ()
    (tmp_path / "tokenizer.json").write_text("{}")
    found = find_tokenizer(tmp_path)
    assert found.type is None and not found.files
    assert "expected vocab.txt or vocab.json and merges.txt or tokenizer.model" in found.notes[0]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_settings_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json is damaged"):
        find_tokenizer(tmp_path)
