"""Memory that a conversion needs, beside the size of the model that is converted.

    python benchmarks/conversion_memory.py [--directions native:hf,hf:native] [--dtype bfloat16]

A model of random values, by default a GPT of 1.3 billion parameters, is written in the format of
each direction's source and converted by the command line of tools/convert_checkpoint.py in a
process of its own, imports and certificate included. What counts is that process' largest resident
set (`ru_maxrss`), which includes the pages of files that it has mapped. This file imports nothing
large, because a child inherits its parent's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "num_layers": 24,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "vocab_size": 50257,
    "max_position_embeddings": 2048,
}
DIRECTIONS = ("native:hf", "hf:native", "native:megatron", "megatron:native")
LIMIT = 1.5
MEGATRON_FLAGS = ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2")
GB = 1e9
# Source, what is written aside, and room for the rest of the machine.
MODELS_ON_DISK = 2.5


def parse_arguments() -> argparse.Namespace:
    """The model's size and the directions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["gpt", "bert"], default="gpt")
    for name, default in SIZES.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=default, help=f"default {default}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument(
        "--directions",
        type=lambda text: text.split(","),
        default=list(DIRECTIONS),
        help="pairs FROM:TO, parted by commas; default " + ",".join(DIRECTIONS),
    )
    parser.add_argument("--directory", type=Path, help="where to work; a temporary one by default")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    work = Path(tempfile.mkdtemp(prefix="conversion_memory_", dir=args.directory))
    try:
        report = measure(args, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(table(report))
    print(json.dumps(report))
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if any(run["of_model"] > LIMIT for run in report["conversions"]):
        sys.exit(f"a conversion needed more than {LIMIT} times the model's size")


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The figures of all directions; a source is made once for the directions that share it."""
    check_disk(args, work)
    conversions: list[dict[str, Any]] = []
    size = 0
    for source in dict.fromkeys(direction.split(":")[0] for direction in args.directions):
        made = work / source
        size = make(args, source, made)
        for direction in args.directions:
            if direction.split(":")[0] == source:
                conversions.append(convert(direction, made, work / "result", size))
                print(json.dumps(conversions[-1]), file=sys.stderr)
        shutil.rmtree(made)
    return {
        "model": args.model,
        "sizes": {name: getattr(args, name) for name in SIZES},
        "dtype": args.dtype,
        "model_gb": round(size / GB, 3),
        "limit": LIMIT,
        "conversions": conversions,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }


def check_disk(args: argparse.Namespace, work: Path) -> None:
    """End the program where the disk has no room for the models."""
    parameters = (
        12 * args.num_layers * args.hidden_size**2
        + (args.vocab_size + args.max_position_embeddings) * args.hidden_size
    )
    needed = MODELS_ON_DISK * parameters * (4 if args.dtype == "float32" else 2)
    free = shutil.disk_usage(work).free
    if free < needed:
        sys.exit(f"{work} has {free / GB:.1f} GB free, {needed / GB:.1f} GB are needed")


def make(args: argparse.Namespace, kind: str, directory: Path) -> int:
    """Write the random model in one format; returns its size in bytes."""
    command = [sys.executable, ROOT / "benchmarks" / "random_model.py"]
    words = ["--format", kind, "--save", directory, "--model", args.model, "--dtype", args.dtype]
    for name in SIZES:
        words += ["--" + name.replace("_", "-"), getattr(args, name)]
    done = subprocess.run(
        [str(word) for word in (*command, *words)], check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout.splitlines()[-1])


def convert(direction: str, load: Path, save: Path, size: int) -> dict[str, Any]:
    """Run one conversion and delete its result; its peak memory, time and certificate."""
    source, target = direction.split(":")
    words = ["--from", source, "--to", target, "--load", load, "--save", save]
    words += MEGATRON_FLAGS if target == "megatron" else ()
    tool = ROOT / "tools" / "convert_checkpoint.py"
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, *map(str, (tool, *words))])
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"the conversion {direction} ended with exit code {child.returncode}")
    certificate = json.loads((save / "parity.json").read_text(encoding="utf-8"))
    shutil.rmtree(save)
    peak = usage.ru_maxrss * 1024  # KiB on Linux
    return {
        "direction": direction,
        "peak_gb": round(peak / GB, 3),
        "of_model": round(peak / size, 3),
        "seconds": round(time.monotonic() - started, 1),
        "max_abs_logit_diff": certificate["max_abs_logit_diff"],
    }


def table(report: dict[str, Any]) -> str:
    """The figures as lines of text."""
    lines = [f"{report['model']} of {report['model_gb']} GB, {report['dtype']}"]
    lines.append(f"{'direction':<20}{'peak GB':>9}{'of model':>10}{'seconds':>9}{'difference':>12}")
    lines += [
        f"{run['direction']:<20}{run['peak_gb']:>9.2f}{run['of_model']:>10.2f}"
        f"{run['seconds']:>9.0f}{run['max_abs_logit_diff']:>12.1e}"
        for run in report["conversions"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
