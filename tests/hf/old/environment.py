"""An environment with transformers 4.34.0, made once where there is none.

The environment variable OLD_TRANSFORMERS names a Python that has it already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
VERSION = "4.34.0"


def old_python() -> Path:
    """The Python of the environment; the first call may install it, which takes minutes."""
    stated = os.environ.get("OLD_TRANSFORMERS")
    if stated:
        return Path(stated)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    directory = cache / "megatron-parity" / f"transformers-{VERSION}-torch-{torch.__version__}"
    python = directory / "bin" / "python"
    if not (directory / "installed").exists():
        print(f"Installing transformers {VERSION} into {directory}, once.", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        packages = [
            f"transformers=={VERSION}",
            "tokenizers<0.15",
            "numpy<2",
            "safetensors",
            f"torch=={torch.__version__.split('+')[0]}",
        ]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (directory / "installed").touch()
    return python


def run_old(arguments: Sequence[str | Path], directory: Path = ROOT) -> str:
    """Run the old environment's Python in ``directory``; this project is at hand in `ROOT` alone.

    Returns what it printed; raises RuntimeError with that where it failed.
    """
    environment = os.environ | {
        "PYTHONPATH": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # The converters read argparse.Namespace, which torch's safe reading refuses.
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    }
    done = subprocess.run(
        [old_python(), *arguments],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))} failed:\n{done.stdout}")
    return done.stdout


def ask(jobs: Sequence[dict[str, Any]], scratch: Path) -> None:
    """Have the oracle do ``jobs`` (see `oracle`); the list is written under ``scratch``."""
    scratch.mkdir(parents=True, exist_ok=True)
    file = scratch / "jobs.json"
    file.write_text(json.dumps(list(jobs)))
    run_old(["-m", "tests.hf.old.oracle", file])
