"""Where the files of a Megatron-LM checkpoint are.

    DIR/latest_checkpointed_iteration.txt        "500000", or "release"
    DIR/iter_0500000/mp_rank_00/model_optim_rng.pt             tensor rank 0
    DIR/iter_0500000/mp_rank_01_002/model_optim_rng.pt         tensor rank 1, pipeline rank 2

The second number stands only where there are several pipeline ranks. The released 345M models are
zip archives of `release`, and are read as they are.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.archive import LazyArchive
from megatron.errors import CheckpointError

LATEST_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
RANK_FILE = "model_optim_rng.pt"
# The second is how files without an optimizer's state were called for a while.
_RANK_FILES = (RANK_FILE, "model_rng.pt")

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_ITERATION = re.compile(r"iter_(\d{7,})")

# `zipfile.Path` offers what is used of `Path` here.
AnyPath = Path | zipfile.Path


@dataclass(frozen=True)
class RankFiles:
    """The files of one checkpoint.

    Attributes:
        where: the checkpoint's directory, or its only file.
        grid: the files, `grid[pipeline rank][tensor rank]`.
    """

    where: AnyPath
    grid: tuple[tuple[AnyPath, ...], ...]

    def iteration(self, saved: object) -> int | None:
        """The iteration; None for a release. `saved` is what the file says, if no name does."""
        directory = self.where
        if isinstance(directory, Path) and directory.is_file():
            directory = directory.parent.parent
        if named := _ITERATION.fullmatch(directory.name):
            return int(named[1])
        return saved if isinstance(saved, int) and saved and directory.name != RELEASE else None


def open_rank_file(file: AnyPath) -> LazyArchive:
    """The content of a file of `RankFiles`.

    Raises:
        CheckpointError: it is damaged, or holds anything but tensors and plain values.
    """
    if isinstance(file, zipfile.Path):
        archive = file.root.filename
        assert archive is not None
        return LazyArchive.open(Path(archive), file.at)
    return LazyArchive(file)


def iteration_directory(iteration: int | None) -> str:
    """The name of a checkpoint's directory; None for a release."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def rank_directory(tensor_rank: int, pipeline_rank: int, pipeline: int) -> str:
    """The name of the directory of a rank among `pipeline` pipeline ranks."""
    suffix = f"_{pipeline_rank:03d}" if pipeline > 1 else ""
    return f"mp_rank_{tensor_rank:02d}{suffix}"


def find_rank_files(path: Path) -> RankFiles:
    """The files of the checkpoint that `path` leads to.

    `path` is a run's directory (then its latest checkpoint is meant), a checkpoint's directory, a
    zip archive of either, or the file of the only rank.

    Raises:
        CheckpointError: there is none, or files of some ranks are missing.
    """
    if path.is_dir():
        return _ranks_of(_checkpoint_in(path))
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file or directory")
    if not _holds_ranks(path):
        return RankFiles(path, ((path,),))
    return _ranks_of(_checkpoint_in(_below_top_folder(zipfile.Path(path))))


def _holds_ranks(path: Path) -> bool:
    """Whether a file is a zip archive of rank files; what torch.save writes is a zip, too."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(_RANK_FILES) for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _below_top_folder(root: zipfile.Path) -> zipfile.Path:
    folders = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(("__", "."))]
    if len(folders) != 1 or _is_checkpoint(folders[0]) or _RANK.fullmatch(folders[0].name):
        return root
    return folders[0]


def _checkpoint_in(root: AnyPath) -> AnyPath:
    """The directory with the ranks: `root`, or the one in it that counts."""
    if _is_checkpoint(root):
        return root
    latest = root / LATEST_FILE
    if latest.is_file():
        found = root / _directory_named_by(latest)
        if not _is_checkpoint(found):
            raise CheckpointError(f"{latest} names {found.name}, but {found} holds no mp_rank_00")
        return found
    candidates = sorted(
        (p for p in root.iterdir() if p.is_dir() and _is_checkpoint(p)), key=lambda p: p.name
    )
    if len(candidates) > 1:
        names = ", ".join(p.name for p in candidates)
        raise CheckpointError(f"{latest} is missing; it says which of {names} to read")
    if not candidates:
        raise CheckpointError(
            f"{root} holds no Megatron-LM checkpoint: expected {LATEST_FILE}, or "
            f"mp_rank_00/{RANK_FILE} in it or in {RELEASE} or iter_0000000"
        )
    return candidates[0]


def _directory_named_by(latest: AnyPath) -> str:
    text = latest.read_text(encoding="utf-8", errors="replace").strip()
    if text == RELEASE:
        return RELEASE
    if not (text.isascii() and text.isdigit()):
        raise CheckpointError(f"{latest}: found {text[:40]!r}, expected an iteration or {RELEASE}")
    return iteration_directory(int(text))


def _is_checkpoint(directory: AnyPath) -> bool:
    return directory.is_dir() and any(
        _RANK.fullmatch(rank.name) and _rank_file(rank) for rank in directory.iterdir()
    )


def _rank_file(directory: AnyPath) -> AnyPath | None:
    return next((f for f in (directory / name for name in _RANK_FILES) if f.is_file()), None)


def _ranks_of(checkpoint: AnyPath) -> RankFiles:
    found = {}
    for directory in checkpoint.iterdir():
        if (match := _RANK.fullmatch(directory.name)) and (file := _rank_file(directory)):
            found[int(match[2] or 0), int(match[1])] = file
    pipeline, tensor = (1 + max(ranks) for ranks in zip(*found, strict=True))
    missing = [
        rank_directory(t, p, pipeline)
        for p in range(pipeline)
        for t in range(tensor)
        if (p, t) not in found
    ]
    if missing:
        raise CheckpointError(
            f"{checkpoint}: the files of {_listed(missing)} are missing among those of "
            f"{tensor} tensor x {pipeline} pipeline ranks"
        )
    grid = tuple(tuple(found[p, t] for t in range(tensor)) for p in range(pipeline))
    return RankFiles(checkpoint, grid)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
