"""What a user's mistake looks like: an exception with clear lines, and how commands report it.

A mistake in the flags is a `ConfigError` and ends a command with exit code 2. A damaged or missing
input is a `DataError` or a `CheckpointError` and ends it with exit code 1. Every entry point hands
its `main` to `run_command`, which prints one `error: ...` line per problem and no traceback. Any
other exception is a fault of the program and keeps its traceback.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

# A mistake in the flags is found by every rank at the same moment. The launcher ends all ranks as
# soon as one has failed, so the others leave rank 0 this long to report it for all of them.
_SECONDS_FOR_RANK_ZERO = 3.0


class UserError(ValueError):
    """A mistake of the user: `problems` holds one line for each, `exit_code` what to end with."""

    exit_code = 1

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(UserError):
    """Flags, or the configuration made of them, that ask for something impossible."""

    exit_code = 2


class DataError(UserError):
    """A dataset, corpus, vocabulary or tokenizer file that is missing, damaged or unfit."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and end the process; a user's mistake becomes `error: ...` lines on stderr."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        _leave_work(error)
    except OSError as error:
        if error.filename is None:  # not about a file that the user named
            raise
        _leave_work(UserError(f"{error.filename}: {error.strerror}"))
    except KeyboardInterrupt:
        sys.exit(130)


def exit_with(error: UserError) -> NoReturn:
    """Print one `error: ...` line for each problem and end the process with the error's code."""
    _report(error)
    sys.exit(error.exit_code)


def _leave_work(error: UserError) -> NoReturn:
    """`exit_with` for a rank in the middle of its work."""
    if _alone():
        exit_with(error)
    _report(error)
    sys.stdout.flush()
    # Threads of a communication library that still wait for other ranks would abort an orderly
    # end of the interpreter, and with it the code.
    os._exit(error.exit_code)


def _alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def _report(error: UserError) -> None:
    """Print the problems; those that all ranks share are left to rank 0 while it lives."""
    shared = isinstance(error, ConfigError)
    rank = int(os.environ.get("RANK", "0"))
    if shared and rank > 0:
        time.sleep(_SECONDS_FOR_RANK_ZERO)
    where = "" if _alone() or (shared and rank == 0) else f"[rank {rank}] "
    sys.stderr.write("".join(f"error: {where}{problem}\n" for problem in error.problems))
    sys.stderr.flush()
