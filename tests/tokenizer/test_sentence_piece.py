"""Properties of tokenizers over SentencePiece models, which are trained here."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import ConfigError, DataError
from megatron.tokenizer import SentencePieceTokenizer, build_tokenizer, load_sentence_piece
from tests.configs import small
from tests.data.support import EXAMPLES
from tests.tokenizer.support import LINES, train_model

letters = st.text(alphabet=sorted(set("".join(LINES)) - set(" ")), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with <unk>, <s>, </s> and <pad>."""
    return train_model(tmp_path_factory.mktemp("model"), pad_id=3)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> SentencePieceTokenizer:
    return load_sentence_piece(model)


def test_it_is_the_tokenizer_of_the_flags(model: Path) -> None:
    flags = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(model)}
    tokenizer = build_tokenizer(small(**flags, vocab_extra_ids=10).data)
    assert tokenizer.vocab_size == 130
    assert tokenizer.sentinels == tuple(range(120, 130))
    assert tokenizer.files == (model,)
    assert tokenizer.type == "SentencePieceTokenizer"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_ids_are_those_of_the_library(tmp_path: Path, kind: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = train_model(tmp_path, model_type=kind)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_sentence_piece(path)
    assert tokenizer.vocab_size == library.get_piece_size()
    assert tokenizer.tokenize_batch(LINES) == [library.encode(line) for line in LINES]
    assert tokenizer.tokenize(LINES[0]) == library.encode(LINES[0])


@given(words=st.lists(letters, min_size=1))
@EXAMPLES
def test_words_come_back(tokenizer: SentencePieceTokenizer, words: list[str]) -> None:
    text = " ".join(words)
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_pieces_that_start_a_word_are_known(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.tokenize("The engine was made")
    assert sum(tokenizer.starts_word[ids]) == 4
    assert tokenizer.starts_word[[tokenizer.bos, tokenizer.eos]].all()


def test_special_tokens_are_those_of_the_model(tokenizer: SentencePieceTokenizer) -> None:
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eod, tokenizer.pad) == (1, 2, 2, 3)
    assert tokenizer.special_ids == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="SentencePieceTokenizer has no mask token"):
        _ = tokenizer.mask


def test_a_model_without_a_beginning_starts_from_its_padding(tmp_path: Path) -> None:
    # <pad>, </s>, <unk>: as the published models of T5 have them.
    path = train_model(tmp_path, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    tokenizer = load_sentence_piece(path)
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos) == (0, 1, 0)


def test_a_model_without_an_end_has_none(tmp_path: Path) -> None:
    tokenizer = load_sentence_piece(train_model(tmp_path, bos_id=-1, eos_id=-1))
    assert tokenizer.eod is None
    assert tokenizer.pad == 0  # <unk> is in every model
    with pytest.raises(ConfigError, match="has no eos token"):
        _ = tokenizer.eos


def test_text_cannot_smuggle_in_special_tokens(tokenizer: SentencePieceTokenizer) -> None:
    for text in ("<s>", "a </s> b", "<pad>", "<extra_id_0>"):
        assert not {1, 2, 3} & set(tokenizer.with_sentinels(5).tokenize(text))
        assert max(tokenizer.with_sentinels(5).tokenize(text)) < 120


def test_special_tokens_and_sentinels_are_written(tokenizer: SentencePieceTokenizer) -> None:
    tokenizer = tokenizer.with_sentinels(2)
    first, last = tokenizer.sentinels
    ids = [*tokenizer.tokenize("The engine"), first, *tokenizer.tokenize("made"), last, 2]
    assert tokenizer.detokenize(ids) == "The engine <extra_id_0> made <extra_id_1> </s>"


def test_the_saved_model_is_the_model(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    files = list((tmp_path / "saved").iterdir())
    assert [file.name for file in files] == ["tokenizer.model"]
    assert load_sentence_piece(files[0]).tokenize(LINES[3]) == tokenizer.tokenize(LINES[3])


@pytest.mark.parametrize("content", [b"", b"no model at all"])
def test_a_damaged_model_is_named(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(DataError, match="x.model: damaged, or no SentencePiece model") as caught:
        load_sentence_piece(tmp_path / "x.model")
    assert "\n" not in caught.value.problems[0]


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    with pytest.raises(DataError, match="nowhere: cannot read the tokenizer model: No such file"):
        load_sentence_piece(tmp_path / "nowhere")


def test_without_the_package_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match="needs the package sentencepiece: pip install"):
        load_sentence_piece(tmp_path / "any.model")
