"""Properties of files that appear complete or not at all."""

import errno
import multiprocessing
import stat
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import BinaryIO

import pytest

from megatron.data.files import built_once, written_aside
from megatron.errors import DataError


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_files_appear_together_at_the_end(tmp_path: Path) -> None:
    first, second = tmp_path / "new" / "a", tmp_path / "new" / "b"
    with written_aside(first, second) as (a, b):
        a.write(b"one")
        b.write(b"two")
        assert not first.exists()
        assert not second.exists()
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")
    assert names(tmp_path / "new") == {"a", "b"}


def test_others_may_read_them(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with written_aside(tmp_path / "a"):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "usual")]
    assert modes[0] == modes[1]


def test_an_exception_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), written_aside(path) as (file,):
        _interrupted(file)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"a"}


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"a: cannot write: No space left"),
        written_aside(tmp_path / "a"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == set()


def _race(path: Path, number: int, start: Barrier) -> None:
    def build(file: BinaryIO) -> None:
        with (path.parent / "builders").open("a") as log:
            log.write(f"{number}\n")
        file.write(b"%d" % number * 100_000)

    start.wait()
    for i in range(20):
        built_once(path.with_name(f"{path.name}{i}"), build)


def test_of_racing_processes_one_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    racers = [context.Process(target=_race, args=(tmp_path / "f", i, start)) for i in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert len((tmp_path / "builders").read_text().split()) == 20
    contents = [(tmp_path / f"f{i}").read_bytes() for i in range(20)]
    assert all(len(set(content)) == 1 and len(content) == 100_000 for content in contents)


def test_a_failed_build_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "index" / "f"

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        built_once(path, fail)
    assert not path.exists()
    built_once(path, lambda file: _write(file, b"whole"))
    built_once(path, fail)
    assert path.read_bytes() == b"whole"


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(DataError, match=r"taken.*cannot write index files.*--data-cache-dir"):
        built_once(tmp_path / "taken" / "f", lambda file: None)


def _interrupted(file: BinaryIO) -> None:
    file.write(b"new")
    raise KeyboardInterrupt


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)
