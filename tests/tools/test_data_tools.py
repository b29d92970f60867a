"""The data tools as a user runs them, from text to a dataset, and their answers to mistakes."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from megatron.data import IndexedDataset
from megatron.tokenizer import load_byte_level, load_sentence_piece, load_wordpiece
from tests.tokenizer.support import train_model

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TEXTS = [
    f"The {thing} number {i} is here. It was made by Dr. Smith, e.g. in a day. Nobody knows why!"
    for i, thing in enumerate(["engine", "house", "garden", "river", "mountain"] * 40)
]


def run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def succeed(tool: str, *arguments: str | Path) -> str:
    result = run(tool, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(tool: str, *arguments: str | Path) -> str:
    """The one line that the tool answers a mistake with."""
    result = run(tool, *arguments)
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def write_corpus(path: Path, texts: Iterable[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": t, "title": t[:9]}) + "\n" for t in texts))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def vocabulary(corpus: Path) -> Path:
    """A WordPiece vocabulary of the corpus."""
    output = corpus.parent / "tokenizer"
    succeed(
        "train_tokenizer.py",
        *("--type", "wordpiece", "--vocab-size", "150", "--input", corpus, "--output", output),
    )
    return output / "vocab.txt"


def preprocess_flags(vocabulary: Path, prefix: Path, *inputs: Path) -> list[str | Path]:
    flags: list[str | Path] = ["--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file"]
    return [*flags, vocabulary, *output_flags(prefix, *inputs)]


def output_flags(prefix: Path, *inputs: Path) -> list[str | Path]:
    return ["--output-prefix", prefix, "--input", *inputs]


@pytest.fixture(scope="module")
def byte_level(corpus: Path) -> tuple[Path, Path]:
    """A byte-level vocabulary of the corpus and its merges."""
    output = corpus.parent / "byte_level"
    succeed(
        "train_tokenizer.py",
        *("--type", "bpe", "--vocab-size", "400", "--input", corpus, "--output", output),
    )
    return output / "vocab.json", output / "merges.txt"


def byte_level_flags(
    byte_level: tuple[Path, Path], prefix: Path, *inputs: Path
) -> list[str | Path]:
    flags: list[str | Path] = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file"]
    return [*flags, byte_level[0], "--merge-file", byte_level[1], *output_flags(prefix, *inputs)]


def test_the_vocabulary_is_that_of_the_text(vocabulary: Path) -> None:
    tokenizer = load_wordpiece(vocabulary, lower_case=True)
    assert tokenizer.vocab_size <= 150
    assert vocabulary.read_text().split("\n")[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = tokenizer.tokenize(TEXTS[0])
    assert len(ids) < 40, "frequent words are whole tokens"
    assert tokenizer.special_ids[1] not in ids
    names = {path.name for path in vocabulary.parent.iterdir()}
    assert names == {"vocab.txt", "tokenizer.json", "tokenizer_config.json"}


def test_the_same_text_gives_the_same_vocabulary(
    corpus: Path, vocabulary: Path, byte_level: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ("--input", corpus, "--output", tmp_path)
    succeed("train_tokenizer.py", *("--type", "wordpiece", "--vocab-size", "150"), *flags)
    succeed("train_tokenizer.py", *("--type", "bpe", "--vocab-size", "400"), *flags)
    for file in (vocabulary, *byte_level):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_byte_pairs_from_text_to_dataset(
    corpus: Path, byte_level: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = byte_level_flags(byte_level, tmp_path / "d", corpus)
    succeed("preprocess_data.py", *flags, "--append-eod")
    tokenizer = load_byte_level(*byte_level)
    dataset = IndexedDataset(tmp_path / "d_text_document")
    assert len(dataset) == len(TEXTS) == len(dataset.documents) - 1
    for i in (0, 77, 199):
        tokens = dataset[i].tolist()
        assert tokens[-1] == tokenizer.eod
        assert tokenizer.detokenize(tokens[:-1]) == TEXTS[i]


def test_sentence_pieces_from_text_to_dataset(corpus: Path, tmp_path: Path) -> None:
    model = train_model(tmp_path)
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    flags += output_flags(tmp_path / "d", corpus)
    succeed("preprocess_data.py", *flags, "--append-eod", "--workers", "2")
    tokenizer = load_sentence_piece(model)
    dataset = IndexedDataset(tmp_path / "d_text_document")
    assert len(dataset) == len(TEXTS)
    for i in (0, 77, 199):
        assert dataset[i].tolist() == [*tokenizer.tokenize(TEXTS[i]), tokenizer.eod]


def test_a_model_without_an_end_cannot_append_it(corpus: Path, tmp_path: Path) -> None:
    model = train_model(tmp_path, eos_id=-1)
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    result = run(
        "preprocess_data.py", *flags, *output_flags(tmp_path / "d", corpus), "--append-eod"
    )
    assert result.returncode == 2
    assert "--append-eod: " in result.stderr and "no token that ends a text" in result.stderr
    assert not list(tmp_path.glob("d_*"))


def test_documents_of_word_pieces_end_with_sep_on_request(
    corpus: Path, vocabulary: Path, tmp_path: Path
) -> None:
    flags = preprocess_flags(vocabulary, tmp_path / "d", corpus)
    succeed("preprocess_data.py", *flags, "--split-sentences", "--append-eod")
    dataset = IndexedDataset(tmp_path / "d_text_sentence")
    ends = {int(dataset[i][-1]) for i in dataset.documents[1:] - 1}
    assert ends == {load_wordpiece(vocabulary, lower_case=True).sep}
    assert int(dataset[0][-1]) not in ends


def test_newlines_between_sentences_are_kept_on_request(
    byte_level: tuple[Path, Path], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", ["One here.\nTwo there.\n\nThree."])
    tokenizer = load_byte_level(*byte_level)
    for flags, sentences in [
        ((), ["One here.", "Two there.", "Three."]),
        (("--keep-newlines",), ["One here.\n", "Two there.\n\n", "Three."]),
    ]:
        arguments = byte_level_flags(byte_level, tmp_path / "d", corpus)
        succeed("preprocess_data.py", *arguments, "--split-sentences", *flags)
        dataset = IndexedDataset(tmp_path / "d_text_sentence")
        found = [tokenizer.detokenize(dataset[i].tolist()) for i in range(len(dataset))]
        assert found == sentences


def test_sentences_become_sequences(corpus: Path, vocabulary: Path, tmp_path: Path) -> None:
    flags = preprocess_flags(vocabulary, tmp_path / "d", corpus)
    output = succeed("preprocess_data.py", *flags, "--split-sentences", "--log-interval", "50")
    assert "200 documents, 600 sequences" in output
    dataset = IndexedDataset(tmp_path / "d_text_sentence")
    assert dataset.documents.tolist() == list(range(0, 601, 3))
    tokenizer = load_wordpiece(vocabulary, lower_case=True)
    for i in (0, 100):
        assert tokenizer.detokenize(dataset[3 * i + 2].tolist()) == "nobody knows why!"
        assert (
            tokenizer.detokenize(dataset[3 * i].tolist())
            == TEXTS[i][:50].split(".")[0].lower() + "."
        )


def test_workers_files_and_keys(corpus: Path, vocabulary: Path, tmp_path: Path) -> None:
    half = len(TEXTS) // 2
    # Long enough for several blocks of work.
    parts = [
        write_corpus(tmp_path / "a.jsonl", TEXTS[:half] * 60),
        write_corpus(tmp_path / "b.jsonl", [*TEXTS[half:] * 60, "", "  "]),
    ]
    outputs = []
    for workers in ("1", "2"):
        prefix = tmp_path / f"workers{workers}"
        flags = preprocess_flags(vocabulary, prefix, *parts)
        keys = ("--json-keys", "text", "title", "--split-sentences", "--workers", workers)
        outputs.append(succeed("preprocess_data.py", *flags, *keys))
    assert "skipped 4 documents without any token" in outputs[0]
    for name in (
        "text_sentence.bin",
        "text_sentence.idx",
        "title_sentence.bin",
        "title_sentence.idx",
    ):
        alone, together = (tmp_path / f"workers{w}_{name}" for w in (1, 2))
        assert alone.read_bytes() == together.read_bytes()
    assert (
        len(IndexedDataset(tmp_path / "workers1_title_sentence").documents) == 60 * len(TEXTS) + 1
    )


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"bad.jsonl: invalid JSON on line 2501, column 13"),
        ('{"body": "x"}', r"bad.jsonl: line 2501 has no key 'text'; its keys: body"),
    ],
)
def test_a_bad_line_is_named_and_leaves_nothing(
    vocabulary: Path, tmp_path: Path, line: str, message: str, workers: str
) -> None:
    bad = write_corpus(tmp_path / "bad.jsonl", (TEXTS * 13)[:2500])
    with bad.open("a") as file:
        file.write(line + "\n" + json.dumps({"text": "Fine."}) + "\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "d_text_document.idx").write_bytes(b"old")
    flags = preprocess_flags(vocabulary, tmp_path / "out" / "d", bad)
    assert message in fail("preprocess_data.py", *flags, "--workers", workers)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"d_text_document.idx"}
    assert (tmp_path / "out" / "d_text_document.idx").read_bytes() == b"old"


def test_other_mistakes_are_one_line(corpus: Path, vocabulary: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    blank = write_corpus(tmp_path / "blank.jsonl", ["", " "])

    def answer(*inputs: Path, vocab: Path = vocabulary, more: tuple[str, ...] = ()) -> str:
        flags = preprocess_flags(vocab, tmp_path / "out" / "d", *inputs)
        line = fail("preprocess_data.py", *flags, *more)
        assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True
        return line

    assert "empty.jsonl: the corpus is empty" in answer(empty)
    assert "the corpus holds no text" in answer(blank)
    assert "nowhere: cannot read the corpus: No such file" in answer(tmp_path / "nowhere")
    assert "nowhere: cannot read the vocabulary" in answer(corpus, vocab=tmp_path / "nowhere")
    too_small = fail(
        "train_tokenizer.py",
        *("--type", "wordpiece", "--vocab-size", "9", "--input", corpus, "--output", tmp_path),
    )
    assert "--vocab-size 9 is too small" in too_small


def test_usage_errors_exit_with_two(corpus: Path, vocabulary: Path, tmp_path: Path) -> None:
    flags = preprocess_flags(vocabulary, tmp_path / "d", corpus)
    for wrong, message in [
        (("--workers", "0"), "--workers: 0 is not at least 1"),
        (("--keep-newlines",), "--keep-newlines: needs --split-sentences"),
        (("--tokenizer-type", "SentencePieceTokenizer"), "needs --tokenizer-model"),
        (("--dataset-impl", "lazy"), "--dataset-impl"),
    ]:
        result = run("preprocess_data.py", *flags, *wrong)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_the_corpus_is_english_and_the_same_each_time(tmp_path: Path) -> None:
    size = ("--max-megabytes", "0.3")
    succeed("make_corpus.py", "--output", tmp_path / "a.jsonl", *size, "--workers", "1")
    succeed("make_corpus.py", "--output", tmp_path / "b.jsonl", *size, "--workers", "2")
    content = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert content == (tmp_path / "b.jsonl").read_text(encoding="utf-8")
    documents = [json.loads(line) for line in content.splitlines()]
    assert 0.25e6 < len(content) < 0.4e6
    assert all(document["source"] and len(document["text"]) > 50 for document in documents)
    words = " ".join(document["text"] for document in documents).lower().split()
    assert words.count("the") > 0.03 * len(words)
    assert len({document["text"] for document in documents}) == len(documents)
    assert ">>>" not in content
