"""A pretraining program run in the test's own process."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from megatron.errors import run_command


class Command:
    """Runs the `main` of a program on flags; what it printed is then in `out` and `err`."""

    def __init__(
        self,
        program: ModuleType,
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self._program, self._capfd, self._monkeypatch = program, capfd, monkeypatch

    def __call__(self, flags: list[str]) -> int:
        """Returns the exit status."""
        self._monkeypatch.setattr(sys, "argv", [f"{self._program.__name__}.py", *flags])
        with pytest.raises(SystemExit) as exited:
            run_command(self._program.main)
        self.out, self.err = self._capfd.readouterr()
        assert isinstance(exited.value.code, int)
        return exited.value.code
