"""Properties of the tokenizers and of what is said of damaged vocabularies."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config import DataConfig
from megatron.config.flags import flags_of
from megatron.errors import ConfigError, DataError
from megatron.tokenizer import (
    TOKENIZER_TYPES,
    FastTokenizer,
    build_tokenizer,
    load_byte_level,
    load_tokenizer,
    load_wordpiece,
)
from tests.configs import small
from tests.data.support import EXAMPLES

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*SPECIAL, "un", "##want", "##ed", "want", "runn", "##ing", "Run", ",", "[", "]", "mask"]


@pytest.fixture
def vocab_txt(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def byte_level_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """All single bytes and a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    directory = tmp_path_factory.mktemp("bpe")
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w")]
    tokens = [*sorted(ByteLevel.alphabet()), *(a + b for a, b in merges), "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")
    return directory / "vocab.json", directory / "merges.txt"


def pieces(tokenizer: FastTokenizer, text: str) -> list[str]:
    return [str(tokenizer.backend.id_to_token(i)) for i in tokenizer.tokenize(text)]


def test_wordpiece_takes_the_longest_pieces(vocab_txt: Path) -> None:
    tokenizer = load_wordpiece(vocab_txt, lower_case=True)
    assert pieces(tokenizer, "Unwanted,running \t RÜNNING") == (
        ["un", "##want", "##ed", ",", "runn", "##ing", "runn", "##ing"]
    )
    assert pieces(tokenizer, "unknown") == ["[UNK]"]
    assert tokenizer.vocab_size == len(PIECES)
    ids = [tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask]
    assert ids == [0, 2, 3, 4]
    assert tokenizer.special_ids == [0, 1, 2, 3, 4]
    assert tokenizer.files == (vocab_txt,)


def test_case_is_kept_on_request(vocab_txt: Path) -> None:
    cased = load_wordpiece(vocab_txt, lower_case=False)
    assert pieces(cased, "Run unwanted") == ["Run", "un", "##want", "##ed"]
    assert pieces(load_wordpiece(vocab_txt, lower_case=True), "Run") == ["[UNK]"]


def test_pieces_that_continue_a_word_are_known(vocab_txt: Path) -> None:
    tokenizer = load_wordpiece(vocab_txt, lower_case=True)
    continuing = [PIECES[i] for i, starts in enumerate(tokenizer.starts_word) if not starts]
    assert continuing == ["##want", "##ed", "##ing"]


def test_text_cannot_smuggle_in_special_tokens(
    vocab_txt: Path, byte_level_files: tuple[Path, Path]
) -> None:
    wordpiece = load_wordpiece(vocab_txt, lower_case=True)
    assert pieces(wordpiece, "[MASK]") == ["[", "mask", "]"]
    byte_level = load_byte_level(*byte_level_files)
    assert byte_level.eod not in byte_level.tokenize("<|endoftext|>")


def test_wordpiece_text_comes_back(vocab_txt: Path) -> None:
    tokenizer = load_wordpiece(vocab_txt, lower_case=True)
    ids = tokenizer.tokenize("unwanted, running")
    assert tokenizer.detokenize(ids) == "unwanted, running"
    assert "[MASK]" in tokenizer.detokenize([*ids, tokenizer.mask])


@given(text=st.text())
@EXAMPLES
def test_any_text_comes_back_from_bytes(byte_level_files: tuple[Path, Path], text: str) -> None:
    tokenizer = load_byte_level(*byte_level_files)
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.tokenize_batch([text, text]) == [tokenizer.tokenize(text)] * 2


def test_byte_level_merges_in_order(byte_level_files: tuple[Path, Path]) -> None:
    tokenizer = load_byte_level(*byte_level_files)
    assert pieces(tokenizer, "hello world") == ["hell", "o", "Ġw", "o", "r", "l", "d"]
    assert tokenizer.vocab_size == 256 + 4 + 1
    assert tokenizer.eod == 260
    starts = [tokenizer.backend.id_to_token(i) for i in tokenizer.starts_word.nonzero()[0]]
    assert sorted(starts) == ["<|endoftext|>", "Ġ", "Ġw"]


def test_every_tokenizer_begins_and_ends_texts(
    vocab_txt: Path, byte_level_files: tuple[Path, Path]
) -> None:
    wordpiece = load_wordpiece(vocab_txt, lower_case=True)
    assert (wordpiece.bos, wordpiece.eos, wordpiece.eod) == (2, 3, 3)  # [CLS], [SEP], [SEP]
    byte_level = load_byte_level(*byte_level_files)
    assert byte_level.special_ids == [260]
    assert {byte_level.bos, byte_level.eos, byte_level.eod, byte_level.pad} == {260}


def test_a_token_that_a_tokenizer_lacks_is_named(byte_level_files: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="--tokenizer-type GPT2BPETokenizer has no mask token"):
        _ = load_byte_level(*byte_level_files).mask


def test_sentinels_stand_behind_the_vocabulary(
    vocab_txt: Path, byte_level_files: tuple[Path, Path]
) -> None:
    for plain in (load_wordpiece(vocab_txt, lower_case=True), load_byte_level(*byte_level_files)):
        words = plain.vocab_size
        tokenizer = plain.with_sentinels(3)
        assert plain.sentinels == ()
        assert tokenizer.sentinels == (words, words + 1, words + 2)
        assert tokenizer.vocab_size == len(tokenizer.starts_word) == words + 3
        assert tokenizer.starts_word[words:].all()
        assert tokenizer.special_ids == [*plain.special_ids, *tokenizer.sentinels]
        text = "<extra_id_1> want"  # no text becomes a sentinel
        assert tokenizer.tokenize(text) == plain.tokenize(text)
        assert plain.with_sentinels(0).vocab_size == words


def test_sentinels_are_written_where_they_stand(
    vocab_txt: Path, byte_level_files: tuple[Path, Path]
) -> None:
    wordpiece = load_wordpiece(vocab_txt, lower_case=True).with_sentinels(2)
    first, second = wordpiece.sentinels
    ids = [first, *wordpiece.tokenize("running"), second, *wordpiece.tokenize("want")]
    assert wordpiece.detokenize(ids) == "<extra_id_0> running <extra_id_1> want"
    byte_level = load_byte_level(*byte_level_files).with_sentinels(2)
    ids = [*byte_level.tokenize("hello"), byte_level.sentinels[1], *byte_level.tokenize(" you")]
    assert byte_level.detokenize(ids) == "hello<extra_id_1> you"


def test_a_vocabulary_that_holds_sentinels_gets_no_second_ones(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*PIECES, "<extra_id_2>"]))
    tokenizer = load_wordpiece(path, lower_case=True)
    assert tokenizer.with_sentinels(2).vocab_size == len(PIECES) + 3
    message = "vocab.txt: holds <extra_id_2>, which --vocab-extra-ids 5 would add"
    with pytest.raises(DataError, match=message):
        tokenizer.with_sentinels(5)


def test_the_flags_give_sentinels(vocab_txt: Path) -> None:
    flags = {"tokenizer_type": "BertWordPieceCase", "vocab_file": str(vocab_txt)}
    assert build_tokenizer(small(**flags, vocab_extra_ids=7).data).vocab_size == len(PIECES) + 7
    assert build_tokenizer(small(**flags).data).sentinels == ()


@pytest.mark.parametrize("lower_case", [True, False])
def test_stock_transformers_loads_what_is_saved(
    vocab_txt: Path, tmp_path: Path, lower_case: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_wordpiece(vocab_txt, lower_case=lower_case).with_sentinels(2)
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "Unwanted, running Run"
    assert theirs(text)["input_ids"] == [ours.cls, *ours.tokenize(text), ours.sep]
    assert theirs("want [MASK]")["input_ids"][-2] == ours.mask == theirs.mask_token_id
    assert len(theirs) == ours.vocab_size
    assert theirs.convert_tokens_to_ids("<extra_id_1>") == ours.sentinels[1]
    assert (tmp_path / "saved" / "vocab.txt").read_bytes() == vocab_txt.read_bytes()


def test_stock_transformers_loads_a_saved_byte_level(
    byte_level_files: tuple[Path, Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_byte_level(*byte_level_files)
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "Hello world, é!"
    assert theirs(text)["input_ids"] == ours.tokenize(text)
    assert theirs.eos_token_id == ours.eod
    reloaded = load_byte_level(tmp_path / "saved" / "vocab.json", tmp_path / "saved" / "merges.txt")
    assert reloaded.tokenize(text) == ours.tokenize(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "vocab.txt: the vocabulary is empty"),
        (b"[PAD]\n\xff\n", r"vocab.txt: byte 6 is not UTF-8"),
        (
            b"[PAD]\n[UNK]\n[CLS]\nword\n",
            r"the vocabulary of 4 tokens: \[SEP\] \[MASK",
        ),
        ("\n".join([*PIECES, "want"]).encode(), "line 17 repeats the token 'want' of line 9"),
    ],
)
def test_a_damaged_vocab_txt_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_wordpiece(tmp_path / "vocab.txt", lower_case=True)


def test_windows_line_ends_are_no_part_of_tokens(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(PIECES).encode())
    assert load_wordpiece(tmp_path / "vocab.txt", lower_case=True).vocab_size == len(PIECES)


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        ("{", "", r"vocab.json: invalid JSON on line 1, column 2"),
        ("[1]", "", r"vocab.json: expected a JSON object of token ids"),
        ('{"a": "b"}', "", r"vocab.json: expected a JSON object of token ids"),
        ('{"a": 0, "b": 2}', "", r"vocab.json: id 1 of 2 is missing"),
        ('{"a": 0, "b": 1}', "a b", r"missing .*<\|endoftext\|>"),
        ('{"a": 0, "<|endoftext|>": 1}', "", r"merges.txt: the vocabulary is empty"),
        ('{"a": 0, "<|endoftext|>": 1}', "#version\na\n", r"merges.txt: line 2 is 'a', expected"),
        ('{"a": 0, "<|endoftext|>": 1}', "a a\n", r"merges.txt: line 1 makes 'aa', which .*lacks"),
    ],
)
def test_damaged_byte_level_files_are_named(
    tmp_path: Path, vocabulary: str, merges: str, message: str
) -> None:
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(DataError, match=message):
        load_byte_level(tmp_path / "vocab.json", tmp_path / "merges.txt")


def test_missing_files_and_flags_are_named(tmp_path: Path, vocab_txt: Path) -> None:
    with pytest.raises(DataError, match="nowhere: cannot read the vocabulary: No such file"):
        load_wordpiece(tmp_path / "nowhere", lower_case=True)
    with pytest.raises(ConfigError, match="--tokenizer-type is not given; expected Bert"):
        build_tokenizer(small().data)
    with pytest.raises(ConfigError, match="--tokenizer-type Foo is not known"):
        load_tokenizer("Foo", None, None)
    with pytest.raises(ConfigError, match="BertWordPieceLowerCase needs --vocab-file"):
        build_tokenizer(small(tokenizer_type="BertWordPieceLowerCase").data)
    with pytest.raises(ConfigError, match="GPT2BPETokenizer needs --merge-file"):
        load_tokenizer("GPT2BPETokenizer", str(vocab_txt), None)
    with pytest.raises(ConfigError, match="SentencePieceTokenizer needs --tokenizer-model"):
        load_tokenizer("SentencePieceTokenizer", str(vocab_txt), None)


def test_the_flag_takes_the_types_that_there_are(vocab_txt: Path) -> None:
    flag = next(flag for flag in flags_of(DataConfig) if flag.name == "tokenizer_type")
    assert flag.choices == TOKENIZER_TYPES
    for name, text in [("BertWordPieceLowerCase", "RUNNING"), ("BertWordPieceCase", "Run")]:
        loaded = load_tokenizer(name, str(vocab_txt), None)
        assert loaded.type == name
        assert 1 not in loaded.tokenize(text)  # [UNK]
