"""The tool that times and draws schedules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.pipeline.schedule import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--stages", 4, "--micro-batches", 6)


def _run(*arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    program = [ROOT / "tools" / "draw_schedule.py"] if code is None else ["-c", code]
    command = [sys.executable, *program, *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_figures_as_json_and_nothing_else(name: str) -> None:
    finished = _run("--schedule", name, *SMALL, "--communication", 0.1, "--json", "-")
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    virtual = 2 if name == "interleaved" else 1
    assert found["virtual"] == virtual
    assert found["bubble"] == pytest.approx(1 - 6 * 3 / found["cost"])
    bound = {"gpipe": 6, "interleaved": 4 * 2 + 3, "zb-2p": 8}.get(name, 4)
    assert len(found["peak_activations"]) == 4
    assert 1 <= max(found["peak_activations"]) <= bound


def test_the_figures_of_1f1b_in_words_and_in_a_file(tmp_path: Path) -> None:
    finished = _run("--schedule", "1f1b", *SMALL, "--json", tmp_path / "found.json")
    assert finished.stdout.splitlines() == [
        "1f1b, 4 ranks, 6 micro-batches",
        "bubble            0.3333",
        "cost              27",
        "peak_activations  4 3 2 1  (forward passes, by rank)",
        f"wrote {tmp_path / 'found.json'}",
    ]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["cost"], found["peak_activations"]) == (27, [4, 3, 2, 1])


def test_times_are_those_of_a_whole_rank() -> None:
    """The same work in more chunks has a smaller bubble: (p - 1) / (v m + p - 1)."""
    for virtual in (1, 2, 4):
        finished = _run(
            "--schedule", "interleaved", "--virtual", virtual,
            "--stages", 4, "--micro-batches", 8, "--json", "-",
        )  # fmt: skip
        found = json.loads(finished.stdout)
        assert found["bubble"] == pytest.approx(3 / (virtual * 8 + 3))


@pytest.mark.parametrize(("name", "split"), [("interleaved", False), ("zb-2p", True)])
def test_a_picture_shows_every_action(tmp_path: Path, name: str, split: bool) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "pictures" / "schedule.svg"
    finished = _run("--schedule", name, *SMALL, "--output", picture)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == f"wrote {picture}"
    drawn = picture.read_text()
    # In an SVG, matplotlib precedes each text with itself as a comment.
    numbers = sum(drawn.count(f"<!-- {i} -->") for i in range(6))
    actions = 4 * 6 * (3 if split else 2 * 2)
    assert actions <= numbers <= actions + 6  # and the ticks of the axis
    assert f"{name}, 4 ranks" in drawn
    assert ("gradient of the weights" in drawn) == split


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--stages", 0), "--stages must be at least 1, found 0"),
        (("--stages", "many"), "--stages: invalid int value: 'many'"),
        (("--micro-batches", -2), "--micro-batches must be at least 1, found -2"),
        (("--virtual", 2), "--virtual 2 needs --schedule interleaved"),
        (("--forward", -1), "--forward must be a time of at least 0, found -1.0"),
        (("--communication", "nan"), "--communication must be a time of at least 0, found nan"),
        (("--retained", 2), "--retained must be from 0 to 1, found 2.0"),
        (
            ("--forward", 0, "--backward", 0, "--weight", 0),
            "--forward, --backward and --weight are all 0: there is nothing to do",
        ),
        (("--colour", 1), "unrecognized arguments: --colour 1"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(
    arguments: tuple[object, ...], problem: str
) -> None:
    finished = _run("--schedule", "1f1b", *SMALL, *arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == f"error: {problem}\n"


def test_an_unknown_schedule_is_one_line() -> None:
    finished = _run("--schedule", "2f2b", *SMALL)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: --schedule: invalid choice: '2f2b' (choose from ")
    assert finished.stderr.count("\n") == 1


def test_an_unknown_kind_of_picture_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "schedule.docx"
    finished = _run("--schedule", "1f1b", *SMALL, "--output", picture)
    assert finished.returncode == 2
    problem = f"{picture}: expected a picture such as .png, .svg or .pdf"
    assert finished.stderr == f"error: {problem}\n"


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys, runpy\n"
        "sys.modules['matplotlib'] = None\n"
        f"sys.argv[0] = {str(ROOT / 'tools' / 'draw_schedule.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    picture = tmp_path / "schedule.png"
    finished = _run("--schedule", "1f1b", *SMALL, "--output", picture, code=code)
    assert finished.returncode == 2
    problem = f"{picture}: drawing needs the package matplotlib: pip install matplotlib"
    assert finished.stderr == f"error: {problem}\n"
