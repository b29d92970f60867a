"""What is said of lines that are no documents."""

import json
from pathlib import Path

import pytest

from megatron.data.jsonl import parse_line, read_lines
from megatron.errors import DataError


def parse(line: bytes, keys: tuple[str, ...] = ("text",)) -> list[str]:
    return parse_line(Path("c.jsonl"), 7, line, keys)


def test_texts_come_in_the_order_of_the_keys() -> None:
    line = json.dumps({"title": "a", "text": "b", "other": 3}).encode()
    assert parse(line, ("text", "title")) == ["b", "a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"c\.jsonl: invalid JSON on line 7, column 13"),
        (b"plain text", r"c\.jsonl: invalid JSON on line 7, column 1"),
        (b'"text"', r"c\.jsonl: line 7 holds a str, expected a JSON object"),
        (b"[1]", r"line 7 holds a list"),
        (b'{"body": "x", "id": 1}', r"line 7 has no key 'text'; its keys: body, id"),
        (b"{}", r"line 7 has no key 'text'; its keys: none"),
        (b'{"text": 5}', r"line 7: 'text' is a int, expected a string"),
        (b'{"text": null}', r"line 7: 'text' is a NoneType, expected a string"),
        (b'{"text": "\xff"}', r"line 7 is not UTF-8 text at byte 10"),
        (b"[" * 100_000, r"invalid JSON on line 7"),
    ],
)
def test_what_is_wrong_is_named(line: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse(line)
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]


def test_lines_are_numbered_in_each_file(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"one\n\n  \ntwo\n")
    second.write_bytes(b"three")
    lines = [(path.name, number, line) for path, number, line in read_lines([first, second])]
    assert lines == [("a", 1, b"one\n"), ("a", 4, b"two\n"), ("b", 1, b"three")]


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\n \n")
    with pytest.raises(DataError, match="a: the corpus is empty"):
        list(read_lines([tmp_path / "a"]))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: cannot read the corpus: No such file"):
        list(read_lines([tmp_path / "nowhere"]))
