"""Where the files of a model are: a local directory, or a copy of one of the Hugging Face hub's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.errors import CheckpointError
from megatron.hf.backends import backend

CONFIG_FILE = "config.json"
SAFETENSORS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
ARCHIVE_FILES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-*-of-*.bin",
)


def locate(
    name_or_path: str | Path, patterns: Sequence[str], user: str, *, subfolder: str = "", **hub: Any
) -> Path:
    """The local directory of a model, which holds those files of it that match the patterns.

    Args:
        user: the class that the files are for.
        hub: cache_dir, revision, token, local_files_only and force_download of the download.

    Raises:
        CheckpointError: it is neither a directory nor found on the hub.
        ImportError: it is no directory, and huggingface_hub is not installed.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path / subfolder
    if path.is_absolute() or str(name_or_path).startswith("."):
        raise CheckpointError(f"{name_or_path}: there is no such directory")
    hugging_face = backend("huggingface_hub", f"{user}.from_pretrained({str(name_or_path)!r})")
    wanted = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
    try:
        found = hugging_face.snapshot_download(str(name_or_path), allow_patterns=wanted, **hub)
    except (OSError, ValueError) as error:  # its own exceptions are among these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name_or_path}: neither a local directory nor a model of the hub: {reason}"
        ) from error
    return Path(found) / subfolder


def locate_weights(name_or_path: str | Path, user: str, **hub: Any) -> Path:
    """The local directory of a model with its weights, safetensors files where there are any.

    Raises:
        CheckpointError, ImportError: as `locate` does.
    """
    directory = locate(name_or_path, SAFETENSORS_FILES, user, **hub)
    if any(file for pattern in SAFETENSORS_FILES for file in directory.glob(pattern)):
        return directory
    return locate(name_or_path, ARCHIVE_FILES, user, **hub)
