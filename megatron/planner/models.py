"""The models that are known by name: those of the launch scripts in `examples/`.

A script says what it would run (`DRY_RUN=1 PYTHON=echo`), so that its flags have no second home:
gpt-18b is what `examples/gpt/18b.sh` trains, llama-70b is `examples/gpt/llama-70b.sh`.
"""

from __future__ import annotations

import difflib
import os
import subprocess
from pathlib import Path

from megatron.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
KINDS = ("bert", "gpt", "t5")


def model_names() -> dict[str, Path]:
    """The script of each model, by the model's name."""
    found = {}
    for kind in KINDS:
        for script in sorted((EXAMPLES / kind).glob("*.sh")):
            size = script.stem
            # A family that is trained by another's program has its own name.
            found[size if size.startswith("llama") else f"{kind}-{size}"] = script
    return found


def model_words(name: str) -> tuple[str, list[str]]:
    """The kind of a model, and the words of a command line that trains it.

    Raises:
        ConfigError: there is no such model.
    """
    scripts = model_names()
    if name not in scripts:
        close = difflib.get_close_matches(name.lower(), scripts, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(scripts)}"
        raise ConfigError(f"--model {name} is not known: {hint}")
    script = scripts[name]
    environment = {"PATH": os.environ.get("PATH", ""), "DRY_RUN": "1", "PYTHON": "echo"}
    finished = subprocess.run(
        ["bash", str(script)], env=environment, capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise ConfigError(f"--model {name}: {script} failed: {finished.stderr.strip()}")
    _, *words = finished.stdout.split()
    return script.parent.name, words
