"""Files that appear complete or not at all, and work that is done once however many race for it."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from megatron.errors import DataError


@contextlib.contextmanager
def written_aside(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Files to write that take the names `paths` when the block ends without an exception.

    Until then, and for ever after an exception, `paths` are what they were before. Directories are
    made where missing. Raises DataError where the disk does not take what is written.
    """
    with contextlib.ExitStack() as stack:
        parts = [_part_file(path, stack) for path in paths]
        try:
            yield [part for part, _ in parts]
            for part, _ in parts:
                part.flush()
                os.fsync(part.fileno())
        except OSError as error:
            if error.filename is not None:  # of another file
                raise
            names = ", ".join(str(path) for path in paths)
            raise DataError(f"{names}: cannot write: {error.strerror}") from error
        for (part, name), path in zip(parts, paths, strict=True):
            part.close()
            os.replace(name, path)


def _part_file(path: Path, stack: contextlib.ExitStack) -> tuple[BinaryIO, str]:
    """An open file beside `path` and its name, which `stack` closes and removes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    stack.callback(Path(name).unlink, missing_ok=True)
    os.fchmod(handle, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
    return stack.enter_context(open(handle, "wb")), name


def built_once(path: Path, build: Callable[[BinaryIO], None]) -> None:
    """Have `build` write the file `path` unless it exists; of processes that race, one builds.

    The operating system frees the lock, on a file beside `path`, when its holder dies. Raises
    DataError where the directory cannot be made or written to.
    """
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                with written_aside(path) as (file,):
                    build(file)
    except OSError as error:
        raise DataError(
            f"{path.parent}: cannot write index files there ({error.strerror}); "
            "name another directory with --data-cache-dir"
        ) from error


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
