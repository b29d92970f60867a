"""Draws the loss curves of one or several runs from their metrics files.

    python tools/plot_metrics.py runs/a.jsonl runs/b.jsonl --output curves.png

One panel for each part of the loss: the reports as a faint line, their running mean as a bold one,
the validation loss as ringed points. `--baseline lm_loss=6.1` draws a loss to compare with.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.errors import ConfigError, run_command
from megatron.monitor import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#2563a8", "#c2571a", "#2f7d4f", "#8a4fa3", "#a63d4f", "#5b6770")
TITLES = {"loss": "Loss", "lm_loss": "Token loss", "nsp_loss": "Next-sentence loss"}


@dataclass(frozen=True)
class Run:
    """The records of one metrics file and the name to show for it."""

    name: str
    records: list[dict[str, float]]

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Iterations and values of the records that have a finite `key`."""
        known = [r for r in self.records if math.isfinite(r.get(key, math.nan))]
        return [r["iteration"] for r in known], [r[key] for r in known]


def parts(runs: Sequence[Run]) -> list[str]:
    """The parts of the training loss in the order of the reports; the loss where it has none.

    Raises ConfigError where nothing reports a loss.
    """
    keys = dict.fromkeys(key for run in runs for record in run.records for key in record)
    found = [k for k in keys if k.endswith("_loss") and not k.startswith(("validation_", "test_"))]
    if not found and "loss" not in keys:
        raise ConfigError(["no loss is reported in " + ", ".join(run.name for run in runs)])
    return found or ["loss"]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the `window` values around each value, of fewer towards both ends."""
    reach = window // 2
    near = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(group) / len(group) for group in near]


def draw(
    runs: Sequence[Run], output: Path, smoothing: int | None, baselines: dict[str, float]
) -> None:
    """Writes the picture; its format is that of the file's ending."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            ["drawing needs the package matplotlib: pip install matplotlib"]
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = parts(runs)
    widths = [3, *[2] * (len(keys) - 1)]
    width = 7.0 if len(keys) == 1 else 3.2 + 1.9 * sum(widths)
    figure, panels = plt.subplots(
        1, len(keys), figsize=(width, 4.4), width_ratios=widths, squeeze=False, layout="constrained"
    )
    for panel, key in zip(panels[0], keys, strict=True):
        _draw_panel(panel, key, runs, smoothing, baselines.get(key))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=160)
    plt.close(figure)


def _draw_panel(
    panel: Axes, key: str, runs: Sequence[Run], smoothing: int | None, baseline: float | None
) -> None:
    for run, color in zip(runs, COLORS * (len(runs) // len(COLORS) + 1), strict=False):
        name = f"{run.name}: " if len(runs) > 1 else ""
        iterations, values = run.curve(key)
        window = smoothing or max(1, len(values) // 25)
        if window > 1:
            panel.plot(iterations, values, color=color, alpha=0.25, linewidth=1)
        mean = running_mean(values, window)
        panel.plot(iterations, mean, color=color, linewidth=2, label=f"{name}training")
        iterations, values = run.curve(f"validation_{key}")
        if values:
            label = f"{name}validation"
            panel.plot(iterations, values, "o", mfc="white", mec=color, mew=1.6, label=label)
    if baseline is not None:
        label = f"baseline {baseline:.2f}"
        panel.axhline(baseline, color="#5b6770", linestyle="--", linewidth=1.4, label=label)
    panel.set_title(TITLES.get(key, key.replace("_", " ")), loc="left", fontweight="bold")
    panel.set_xlabel("iteration")
    panel.set_ylabel("nats" if key != "loss" else "loss")
    panel.grid(axis="y", color="#d9dde1", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.02)
    panel.legend(frameon=False)


def _baseline(text: str) -> tuple[str, float]:
    key, separator, value = text.partition("=")
    try:
        return (key, float(value)) if separator else ("lm_loss", float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected PART=VALUE, found {text!r}") from None


def main() -> None:
    """Reads the command line and draws."""
    parser = argparse.ArgumentParser(
        prog="plot_metrics.py",
        description="Draw the loss curves of runs from the files that --metrics-file wrote.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl", help="metrics files")
    parser.add_argument("--output", type=Path, required=True, help="picture to write (.png, .svg)")
    parser.add_argument(
        "--smoothing", type=int, metavar="N", help="reports in the running mean (default: 1 in 25)"
    )
    parser.add_argument(
        "--baseline",
        type=_baseline,
        action="append",
        default=[],
        metavar="PART=VALUE",
        help="loss to draw as a dashed line, e.g. lm_loss=6.1; may be repeated",
    )
    arguments = parser.parse_args()
    if arguments.smoothing is not None and arguments.smoothing < 1:
        parser.error(f"--smoothing must be at least 1, found {arguments.smoothing}")
    runs = [Run(path.stem, list(read_metrics(path))) for path in arguments.files]
    draw(runs, arguments.output, arguments.smoothing, dict(arguments.baseline))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run_command(main)
