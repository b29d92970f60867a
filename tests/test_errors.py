"""A user's mistake ends a command with its lines and its code; a fault keeps its traceback."""

import sys
from collections.abc import Callable

import pytest

from megatron import errors
from megatron.errors import CheckpointError, ConfigError, DataError, run_command


def end_of(main: Callable[[], int | None]) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    return caught.value.code


def raising(error: BaseException) -> Callable[[], int | None]:
    def main() -> int | None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError(["a", "b"]), 2, ["error: a", "error: b"]),
        (DataError("x.idx is cut off"), 1, ["error: x.idx is cut off"]),
        (CheckpointError("no weights"), 1, ["error: no weights"]),
        (FileNotFoundError(2, "No such file", "x"), 1, ["error: x: No such file"]),
        (KeyboardInterrupt(), 130, []),
    ],
)
def test_a_mistake_is_reported(
    error: BaseException, code: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(raising(error)) == code
    assert capsys.readouterr().err.splitlines() == lines


def test_what_main_returns_is_the_exit_code() -> None:
    assert end_of(lambda: None) == 0
    assert end_of(lambda: 3) == 3


@pytest.mark.parametrize("fault", [ValueError("a"), OSError(5, "b"), ZeroDivisionError()])
def test_a_fault_keeps_its_traceback(fault: Exception) -> None:
    with pytest.raises(type(fault)):
        run_command(raising(fault))


def test_ranks_are_named_and_leave_shared_mistakes_to_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", waits.append)
    monkeypatch.setattr(errors.os, "_exit", sys.exit)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    end_of(raising(DataError("gone")))
    assert waits == []
    end_of(raising(ConfigError("wrong")))
    assert len(waits) == 1
    monkeypatch.setenv("RANK", "0")
    end_of(raising(ConfigError("wrong")))
    assert len(waits) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: [rank 3] gone",
        "error: [rank 3] wrong",
        "error: wrong",
    ]
