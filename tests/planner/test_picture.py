"""Pictures of plans; those of schedules alone are tested with the tool that draws them."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.pipeline.simulator import Costs, simulate
from megatron.planner.drawing import check_picture
from megatron.planner.picture import draw_plan
from megatron.planner.plan import Plan
from tests.planner.plans import GIB, plan


def _texts(made: Plan, tmp_path: Path) -> list[str]:
    """The texts of the picture; in an SVG, matplotlib precedes each with itself as a comment."""
    path = tmp_path / "plan.svg"
    draw_plan(made, path)
    return re.findall("<!-- (.*) -->", path.read_text())


def test_a_short_step_is_shown_with_every_action(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    texts = _texts(plan(ranks=3, micro_batches=7), tmp_path)
    numbers = [text for text in texts if text in map(str, range(1, 7))]
    assert len(numbers) == 3 * 6 * 2
    assert [f"rank {rank}" in texts for rank in range(4)] == [True, True, True, False]
    assert "A: beginning" not in texts
    assert "time in ms" in texts
    assert "outside the pipeline: parameters, gradients, update" in texts
    # The sums of the ranks' memory, and what the GPU has of it.
    assert [text for text in texts if re.fullmatch(r"[34]\d\.\d", text)] == ["42.7", "38.0", "38.7"]
    assert "78.0 of 80.0 GiB usable" in texts


def test_a_long_step_is_shown_in_small_and_in_parts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    texts = _texts(plan(ranks=4, micro_batches=150, rest=0), tmp_path)
    begins = [texts.index(name) for name in ("A: beginning", "B: middle", "C: end")]
    # A panel's title comes behind what is in it: numbers of micro-batches, and ticks.
    panels = [texts[first:last] for first, last in zip([0, *begins], begins, strict=False)]
    first, middle, last = (
        {int(text) for text in panel if re.fullmatch(r"\d{1,3}", text)} for panel in panels
    )
    assert {0, 1, 2} <= first
    assert 75 in middle
    assert {147, 148, 149} <= last
    assert not {1, 2} & (middle | last)
    assert not {148, 149} & (first | middle)
    assert "outside the pipeline: parameters, gradients, update" not in texts


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_the_same_plan_is_the_same_file(tmp_path: Path, ending: str) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    made = plan(ranks=3, micro_batches=40)
    first, second = tmp_path / "new" / f"first.{ending}", tmp_path / f"second.{ending}"
    draw_plan(made, first)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):
        draw_plan(made, second)
    assert first.read_bytes() == second.read_bytes()


def test_a_plan_that_does_not_fit_says_so(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    texts = _texts(plan(activations=20 * GIB), tmp_path)
    assert any("does not fit: rank 0 needs 116.71 of 78.00 GiB" in text for text in texts)


@pytest.mark.parametrize("name", ["plan.docx", "plan.pgf", "plan", ".png"])
def test_an_unknown_kind_of_picture_is_one_line(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    with pytest.raises(ConfigError) as caught:
        draw_plan(plan(), path)
    assert caught.value.problems == (f"{path}: expected a picture such as .png, .svg or .pdf",)
    assert not path.exists()


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="^plan.png: drawing needs the package matplotlib: pip"):
        check_picture(Path("plan.png"))


def test_long_boxes_have_no_larger_numbers_than_most(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.svg"
    made = plan("zb-h1", ranks=3, micro_batches=19, rest=0)
    draw_plan(replace(made, simulation=simulate(made.schedule, Costs(1, 4, 1, 0))), path)
    texts = re.findall(r"<!-- (.*) -->\s*<g [^>]*scale\(([\d.]+) ", path.read_text())
    # Numbers that stand on the axis of time are left out.
    sizes = [float(size) for text, size in texts if re.fullmatch(r"[1-9]|1[1-8]", text)]
    assert len(sizes) >= 3 * 3 * 17
    assert max(sizes) <= 1.01 * min(sizes)
