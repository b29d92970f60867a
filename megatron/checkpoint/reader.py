"""A checkpoint on disk as one object: its configuration, its run state and its global tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.directory import checkpoint_path
from megatron.checkpoint.stored import StoredTensors
from megatron.config import Config
from megatron.errors import CheckpointError, ConfigError

RUN_STATE_FILE = "run_state.json"
CONFIG_FILE = "config.yaml"
TOKENIZER_DIRECTORY = "tokenizer"
FORMAT = 1

# How the names of tensors begin that are no weights of the model.
OPTIMIZER = "optimizer."
MASTER = "optimizer.master."
RANDOM = "random."


def is_optimizer(key: str) -> bool:
    """Whether the tensor stored as `key` is state of the optimizer."""
    return key.startswith(OPTIMIZER)


def is_weight(key: str) -> bool:
    """Whether the tensor stored as `key` is one of the model's weights."""
    return not key.startswith((OPTIMIZER, RANDOM))


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint in the directory `path`: of which run and iteration, and what it stores."""

    path: Path
    iteration: int
    config: Config
    run_state: dict[str, Any]
    stored: StoredTensors

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """The latest checkpoint of a run's directory; no tensor is read yet.

        Raises:
            CheckpointError: there is none, or a file of it is missing or damaged.
        """
        path = checkpoint_path(directory)
        stored = StoredTensors(path)
        saved = _read_run_state(path / RUN_STATE_FILE)
        config = _read_config(path / CONFIG_FILE)
        return cls(path, saved["iteration"], config, saved["state"], stored)

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """The global shape of every weight of the model."""
        return {key: shape for key, shape in self.stored.shapes.items() if is_weight(key)}

    @property
    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files, which travel with the checkpoint."""
        return sorted((self.path / TOKENIZER_DIRECTORY).glob("*"))


def load_config(directory: Path) -> Config:
    """The configuration of the run whose latest checkpoint is in `directory`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return _read_config(checkpoint_path(directory) / CONFIG_FILE)


def load_global_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every weight of the latest checkpoint in `directory`, one at a time.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    checkpoint = Checkpoint.open(directory)
    for key in checkpoint.weights:
        yield key, checkpoint.stored.read(key)


def _read_run_state(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        found = saved.get("format") if isinstance(saved, dict) else None
        raise CheckpointError(f"{path}: found format {found}, expected {FORMAT}")
    if not isinstance(saved.get("iteration"), int) or not isinstance(saved.get("state"), dict):
        raise CheckpointError(f"{path} is damaged: it holds no iteration and state")
    return saved


def _read_config(path: Path) -> Config:
    try:
        return Config.from_yaml(_read_text(path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {problem}" for problem in error.problems) from error


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    return path.read_text(encoding="utf-8", errors="replace")
