"""Documents in JSONL: one JSON object a line, its texts under given keys."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.errors import DataError


def read_lines(paths: Sequence[Path]) -> Iterator[tuple[Path, int, bytes]]:
    """File, line number from 1 and content of every line that is not blank.

    Raises DataError where a file cannot be read, or where all are empty.
    """
    empty = True
    for path in paths:
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.isspace():
                        empty = False
                        yield path, number, line
        except OSError as error:
            raise DataError(f"{path}: cannot read the corpus: {error.strerror}") from error
    if empty:
        names = ", ".join(str(path) for path in paths)
        raise DataError(f"{names}: the corpus is empty, expected one JSON object a line")


def parse_line(path: Path, number: int, line: bytes, keys: Sequence[str]) -> list[str]:
    """The texts under `keys` of one line; raises DataError naming file, line and what is wrong."""
    try:
        document = json.loads(line.rstrip(b"\r\n"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line {number} is not UTF-8 text at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: invalid JSON on line {number}, column {error.colno}: {error.msg}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: invalid JSON on line {number}: nested too deeply") from error
    if not isinstance(document, dict):
        found = type(document).__name__
        raise DataError(f"{path}: line {number} holds a {found}, expected a JSON object")
    for key in keys:
        if key not in document:
            known = ", ".join(sorted(document)) or "none"
            raise DataError(f"{path}: line {number} has no key {key!r}; its keys: {known}")
        if not isinstance(document[key], str):
            found = type(document[key]).__name__
            raise DataError(f"{path}: line {number}: {key!r} is a {found}, expected a string")
    return [document[key] for key in keys]
