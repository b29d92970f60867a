"""The answers of transformers 4.34.0 that lie in the repository (written by `make_fixture`)."""

from __future__ import annotations

import tempfile
import zipfile
from functools import cache
from pathlib import Path

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "transformers-4.34.0.zip"


def case_names() -> list[str]:
    """The cases, each named by a number and its class."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        return sorted({name.split("/")[0] for name in archive.namelist()})


def case_directory(name: str) -> Path:
    """Where the files of a case lie: its model, answer.json and answer.safetensors."""
    return Path(_unpacked().name) / name


@cache
def _unpacked() -> tempfile.TemporaryDirectory[str]:
    """All files in a directory of their own, which goes when the process ends."""
    directory = tempfile.TemporaryDirectory()
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(directory.name)
    return directory
