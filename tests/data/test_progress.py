"""What is said of long work ends with how far it came."""

from __future__ import annotations

import io

import pytest

from megatron.data.progress import Progress


class Terminal(io.StringIO):
    """A stream that is looked at by a person."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_the_last_count_is_said(stream: io.StringIO) -> None:
    progress = Progress("wrote", "MB", total=7, every=3, stream=stream)
    for count in range(1, 8):
        progress.advance(count)
    progress.close()
    said = [line for line in stream.getvalue().replace("\r", "\n").split("\n") if line.strip()]
    assert [line.split(",")[0] for line in said] == [f"wrote {n} of 7 MB" for n in (3, 6, 7)]
    assert stream.getvalue().endswith("\n")


def test_short_work_is_not_spoken_of() -> None:
    stream = io.StringIO()
    progress = Progress("wrote", "MB", stream=stream)
    progress.advance(1)
    progress.close()
    assert stream.getvalue() == ""


def test_nothing_is_said_twice() -> None:
    stream = io.StringIO()
    progress = Progress("wrote", "MB", every=2, stream=stream)
    progress.advance(2)
    progress.close()
    assert stream.getvalue().count("wrote 2") == 1
