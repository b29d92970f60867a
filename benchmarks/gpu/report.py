"""The findings as Markdown: what ran, each goal with its figure, and the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SHARE_OF_COPY = 0.9
NOT_SLOWER = 1.0
OVER_PEERS = 1.2
DIFFERENCE = 1e-2  # in bfloat16, at full size
TRIAL = "smoke"  # a machine of this name is none

Found = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A goal, the figure that was found, and the one that was wanted."""

    what: str
    found: float
    wanted: float
    at_most: bool = False

    @property
    def is_reached(self) -> bool:
        """Whether the figure is good enough."""
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted


def goals(found: Found) -> Iterator[Goal]:
    """Every goal about which there is a figure."""
    for name, case in found.get("kernels", {}).items():
        if "share_of_copy" in case:
            yield Goal(f"{name}: share of a copy", case["share_of_copy"], SHARE_OF_COPY)
        for peer in ("torch", "compiled"):
            if f"ratio_to_{peer}" in case:
                yield Goal(f"{name}: to {peer}", case[f"ratio_to_{peer}"], NOT_SLOWER)
        if "difference" in case:
            yield Goal(f"{name}: difference", case["difference"], DIFFERENCE, at_most=True)
    for name, training in found.get("training", {}).items():
        best = training.get("contestants", {}).get(training.get("best"), {})
        if "share_of_matmul" in best:
            share = best["share_of_matmul"]
            yield Goal(f"{name}: share of a matrix product", share, training["goal"])
        for peer, ratio in training.get("ratios", {}).items():
            yield Goal(f"{name}: to {peer}", ratio, OVER_PEERS)


def markdown(found: Found) -> str:
    """All of it."""
    parts = [
        "# GPU check",
        _machine(found.get("machine", {})),
        _sections(found),
        _goals(list(goals(found))),
        _kernels(found.get("kernels", {})),
        *(_training(name, each) for name, each in found.get("training", {}).items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(machine: Found) -> str:
    if not machine:
        return ""
    is_trial = machine["name"] == TRIAL
    words = ["A trial on a CPU, whose figures mean nothing" if is_trial else machine["name"]]
    if "driver" in machine:
        words.append(f"driver {machine['driver']}, CUDA {machine['cuda']}")
    words.append(f"PyTorch {machine['torch']}, Python {machine['python']}")
    if "copy_gb_per_second" in machine:
        copied = machine["copy_gb_per_second"]
        words.append(f"a copy moves {copied:.0f} GB/s, counting what is read and what is written")
    if "matmul_tflops" in machine:
        rate = machine["matmul_tflops"]
        words.append(f"a product of two 8192 x 8192 bfloat16 matrices runs at {rate:.0f} TFLOP/s")
    return "; ".join(words) + "."


def _sections(found: Found) -> str:
    rows = []
    for name, section in found["sections"].items():
        rows.append([name, section["state"], f"{section['seconds']:.0f}", _words(name, found)])
    return _table(["section", "", "seconds", ""], rows)


def _words(name: str, found: Found) -> str:
    """What a section that measures nothing found."""
    own = found.get(name, {})
    if name == "build" and "library" in own:
        return f"{own['files']} files, {own['library']}"
    if name == "tests" and "passed" in own:
        counts = (f"{own[kind]} {kind}" for kind in ("passed", "skipped", "failed"))
        return "; ".join([", ".join(counts), *own["failures"]])
    if name == "sanitizer":
        verdicts = [f"{tool}: {own[tool]}" for tool in ("racecheck", "memcheck") if tool in own]
        return "; ".join([*verdicts, own["note"]] if "note" in own else verdicts)
    if name == "agreement" and own:
        wrong = [layout for layout, each in own.items() if not each["agrees"]]
        return f"{len(own) - len(wrong)} of {len(own)} runs agree " + "; ".join(wrong)
    return ""


def _goals(all_goals: Sequence[Goal]) -> str:
    if not all_goals:
        return ""
    reached = sum(goal.is_reached for goal in all_goals)
    rows = [
        [
            goal.what,
            f"{goal.found:.3g}",
            f"{'≤' if goal.at_most else '≥'} {goal.wanted:g}",
            "reached" if goal.is_reached else "**missed**",
        ]
        for goal in sorted(all_goals, key=lambda goal: goal.is_reached)
    ]
    title = f"## Goals: {reached} of {len(all_goals)} reached"
    return f"{title}\n\n{_table(['goal', 'found', 'wanted', ''], rows)}"


def _kernels(cases: Found) -> str:
    if not cases:
        return ""
    rows = []
    for name, case in cases.items():
        if "absent" in case:
            rows.append([name, case["absent"]])
            continue
        if "bytes" not in case:
            continue
        rows.append(
            [
                name,
                f"{case['bytes'] / 1e6:.0f}",
                f"{case['microseconds']:.0f}",
                f"{case['gb_per_second']:.0f}",
                f"{case['share_of_copy']:.0%}",
                _ratio(case, "torch"),
                _ratio(case, "compiled"),
            ]
        )
    header = ["kernel", "MB", "µs", "GB/s", "of a copy", "to torch", "to torch.compile"]
    return f"## Kernels\n\n{_table(header, rows)}"


def _ratio(case: Found, peer: str) -> str:
    return f"{case[f'ratio_to_{peer}']:.2f}" if f"ratio_to_{peer}" in case else "–"


def _training(name: str, training: Found) -> str:
    if "contestants" not in training:
        return f"## {name}\n\n{training['absent']}"
    rows = []
    for title, row in training["contestants"].items():
        ratio = training.get("ratios", {}).get(title)
        cells = [title, f"{row['tokens_per_second']:.0f}", f"{row['model_tflops']:.1f}"]
        for share in ("share_of_matmul", "share_without_what_is_masked"):
            cells.append(f"{row[share]:.0%}" if share in row else "–")
        cells.append(f"{row['peak_gib']:.1f}")
        cells.append("–" if ratio is None else f"{ratio:.2f}")
        rows.append(cells)
    rows += [[title, reason] for title, reason in training["absent"].items()]
    header = [
        "",
        "tokens/s",
        "model TFLOP/s",
        "of matmul",
        "causal half",
        "GiB",
        "ours is faster by",
    ]
    return f"## {name}\n\n{_table(header, rows)}\n\n{_planned(training)}"


def _planned(training: Found) -> str:
    plan = training["planned"]
    return (
        f"A dry run for {plan['for']} says {training['tokens'] / plan['seconds']:.0f} tokens/s "
        f"and {plan['peak_gib']:.1f} GiB."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    filled = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    lines = [header, ["---"] * len(header), *filled]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in r) + " |" for r in lines)
