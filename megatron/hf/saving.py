"""Write a model's tensors and configuration as `transformers` reads them, one tensor at a time.

Files are written aside and moved into place when all of them are complete; then whatever weights
an earlier save has left there, and which would be read in place of these or beside them, go.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from megatron.checkpoint.archive.writer import DeferredTensor, write_archive
from megatron.checkpoint.safetensors_writer import (
    TensorPlan,
    file_names,
    shards_of,
    write_index,
    write_safetensors,
)
from megatron.errors import ConfigError

_UNITS = {"": 1, **{f"{p}B": 1000**n for n, p in enumerate(("", "K", "M", "G", "T"))}}
_UNITS |= {f"{p}IB": 1024**n for n, p in enumerate(("", "K", "M", "G", "T")) if p}
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def number_of_bytes(size: int | str) -> int:
    """A size such as 1000, "200MB" or "5GiB".

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f'max_shard_size: found {size!r}, expected a size such as "5GB"')
    return int(float(match[1]) * _UNITS[match[2].upper()])


def write_model(
    directory: Path,
    config: str,
    plans: Sequence[TensorPlan],
    tensors: Iterator[Tensor],
    *,
    max_bytes: int,
    safetensors: bool,
) -> None:
    """Write config.json, which is `config`, and the tensors, which come in the order of `plans`."""
    directory.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        write = write_safetensors if safetensors else _write_archives
        write(aside, plans, tensors, max_bytes=max_bytes)
        (aside / "config.json").write_text(config, encoding="utf-8")
        written = [file.name for file in sorted(aside.iterdir())]
        for name in written:
            (aside / name).replace(directory / name)
    finally:
        shutil.rmtree(aside)
    for file in directory.iterdir():
        if _WEIGHTS.fullmatch(file.name) and file.name not in written:
            file.unlink()


def _write_archives(
    directory: Path, plans: Sequence[TensorPlan], tensors: Iterable[Tensor], *, max_bytes: int
) -> None:
    """The same as files of `torch.save`, or several and an index."""
    stream = iter(tensors)
    shards = list(shards_of(plans, max_bytes))
    files = dict(zip(file_names("pytorch_model", "bin", len(shards)), shards, strict=True))
    for file, shard in files.items():
        tree = {
            plan.name: DeferredTensor(plan.shape, plan.dtype, lambda: next(stream))
            for plan in shard
        }
        write_archive(directory / file, tree)
    if len(files) > 1:
        write_index(directory / "pytorch_model.bin.index.json", files)
