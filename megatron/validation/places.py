"""Whether a directory that flags name can be written to, found without writing."""

import os
from pathlib import Path

WARNING = "warning: "  # begins a line about what training would live with, at least for a while


def existing_part(directory: Path) -> Path:
    """The directory, or of those that it is to be made in the nearest one that exists."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return directory


def why_not_writable(directory: Path) -> str | None:
    """Why no file can be made in a directory, which may have to be made first; None where one can.

    Like a sentence's predicate: "/data is not writable".
    """
    found = existing_part(directory.absolute())
    if not found.is_dir():
        return f"{found} is no directory"
    if not os.access(found, os.W_OK | os.X_OK):
        return f"{found} is not writable"
    return None
