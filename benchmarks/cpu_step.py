"""Speed of a training step on the CPU, beside other frameworks in the same run.

    python benchmarks/cpu_step.py [--model gpt] [--rounds 15] [--layouts single,tp,tp-sp,pp,dp]
    python benchmarks/cpu_step.py --model bert

GPT (`benchmarks.gpt_step`): this project, `transformers`, megatron-core where it is installed
(`pip install --no-deps megatron-core`), and plain PyTorch, on one process with two threads and on
two processes. BERT (`benchmarks.bert_step`): this project and `transformers` on one process.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import bert_step, gpt_step  # noqa: E402 - after the search path is set
from benchmarks.contest import ContestantError  # noqa: E402

MODELS = {"gpt": gpt_step, "bert": bert_step}
DEFAULTS: dict[str, dict[str, int]] = {
    "gpt": {"num_layers": 5, "vocab_size": 6144, "batch_size": 8},
    "bert": {"num_layers": 8, "vocab_size": 8192, "batch_size": 16},
}
FILE_WIDTH = 150
SIZES = {
    "hidden_size": "width of the residual stream",
    "num_layers": "layers",
    "num_attention_heads": "attention heads",
    "seq_length": "tokens of a sequence",
    "vocab_size": "tokens of the vocabulary",
    "batch_size": "sequences of a step",
    "micro_batches": "parts of a step's batch; of GPT's in a pipeline only",
    "threads": "of BERT's process",
    "rounds": "measurements that count",
    "steps": "of one measurement of GPT",
}
COMMON = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "seq_length": 256,
    "micro_batches": 4,
    "threads": 2,
    "rounds": 15,
    "steps": 1,
}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The sizes of the model and the batch, and how often to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="gpt", help="default gpt")
    for name, text in SIZES.items():
        defaults = {model: (COMMON | DEFAULTS[model])[name] for model in MODELS}
        said = " or ".join(f"{n}" for n in dict.fromkeys(defaults.values()))
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, help=f"{text}; default {said}")
    parser.add_argument(
        "--layouts",
        type=lambda text: text.split(","),
        default=list(gpt_step.LAYOUTS),
        help="GPT's, parted by commas; default all of " + ",".join(gpt_step.LAYOUTS),
    )
    parser.add_argument(
        "--peers",
        type=lambda text: text.split(","),
        default=list(gpt_step.PEERS),
        help="GPT's, parted by commas; default all of " + ",".join(gpt_step.PEERS),
    )
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    args = parser.parse_args(words)
    for name, value in (COMMON | DEFAULTS[args.model]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for flag, given, known in (
        ("--layouts", args.layouts, gpt_step.LAYOUTS),
        ("--peers", args.peers, gpt_step.PEERS),
    ):
        unknown = set(given) - set(known)
        if unknown:
            parser.error(f"{flag} {','.join(sorted(unknown))} is none of {', '.join(known)}")
    return args


def main() -> None:
    """Measure and report."""
    args = parse_arguments()
    width = None if sys.stdout.isatty() else FILE_WIDTH
    try:
        result: dict[str, Any] = MODELS[args.model].run(args, Console(width=width))
    except ContestantError as error:
        sys.exit(str(error))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
