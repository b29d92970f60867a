"""Reads vocabulary files and says exactly what is wrong with a damaged one."""

from collections.abc import Iterable
from pathlib import Path

from megatron.errors import DataError


def read_text(path: Path) -> str:
    """The text of a vocabulary file; raises DataError where it is missing, empty or no text."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 text") from error
    except OSError as error:
        raise DataError(f"{path}: cannot read the vocabulary: {error.strerror}") from error
    if not text.strip():
        raise DataError(f"{path}: the vocabulary is empty")
    return text


def require_special(path: Path, vocabulary: Iterable[str], special: Iterable[str]) -> None:
    """Raise DataError naming the special tokens that the vocabulary lacks."""
    known = set(vocabulary)
    missing = [token for token in special if token not in known]
    if missing:
        raise DataError(
            f"{path}: special tokens missing from the vocabulary of {len(known)} tokens: "
            + " ".join(missing)
        )
