"""Which of the tensors in someone's files are which of a model's, and their way into parameters.

Files differ from a model's names in two ways that are harmless: the bare network's names have no
prefix where a model with heads has one, or the other way round; and what two names stand for may be
there under either. Whatever then is missing, left over or of another shape is found from names and
shapes alone, before any tensor is read, and alike on all ranks.

The tensors are read one at a time. A rank keeps its own part and no more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron.checkpoint.name_map import Entry
from megatron.checkpoint.tensor_source import TensorSource
from megatron.errors import CheckpointError
from megatron.mpu import Axis, ShardSpec

Shape = tuple[int, ...]
# Buffers that their constructors fill.
BUFFERS = (r"embeddings\.position_ids$", r"embeddings\.token_type_ids$")


@dataclass(frozen=True)
class Naming:
    """How a class of models calls its tensors.

    Attributes:
        entries: one for each of its tensors.
        shapes: the global shape of each of these by our name.
        aliases: further names, and for each the name of the same tensor among those of `entries`.
        preferred: those of them that are read where both names are in the files.
        prefix: what the names of the bare network have in front in classes with heads.
        has_heads: whether this is such a class.
    """

    entries: Sequence[Entry]
    shapes: Mapping[str, Shape]
    aliases: Mapping[str, str]
    preferred: Collection[str]
    prefix: str
    has_heads: bool


@dataclass(frozen=True)
class Found:
    """What is in the files.

    Attributes:
        stored: for each of the model's names the name in the files.
        mismatched: for each name that has another shape in the files, that shape and the model's.
    """

    stored: Mapping[str, str]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)

    def has(self, entry: Entry) -> bool:
        """Whether all that a tensor of ours is made of is there, with the right shapes."""
        return all(name in self.stored and name not in self.mismatched for name in entry.theirs)


def find(naming: Naming, source: TensorSource) -> Found:
    """Compare what a model needs with what there is."""
    in_files = {_as_named(name, naming, source.shapes): name for name in source.shapes}
    needed = [name for entry in naming.entries for name in entry.theirs]
    stored = {name: in_files[name] for name in needed if name in in_files}
    for alias, name in naming.aliases.items():
        if alias in in_files and (name not in stored or alias in naming.preferred):
            stored[name] = in_files[alias]
    missing = []
    mismatched = {}
    for entry in naming.entries:
        for name, shape in zip(entry.theirs, entry.shapes(naming.shapes[entry.ours]), strict=True):
            if name not in stored:
                missing.append(name)
            elif (found := tuple(source.shapes[stored[name]])) != tuple(shape):
                mismatched[name] = found, tuple(shape)
    known = {*needed, *naming.aliases}
    unexpected = sorted(name for name in in_files if name not in known)
    return Found(stored, missing, unexpected, mismatched)


def without(names: Iterable[str], patterns: Collection[str]) -> list[str]:
    """The names in which none of the patterns is found."""
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def read_into(
    local: Tensor, spec: ShardSpec, entry: Entry, source: TensorSource, found: Found, axis: Axis
) -> None:
    """Fill a rank's part of a tensor of ours from those of theirs; padding becomes zeros.

    Raises:
        CheckpointError: the data is damaged.
    """
    whole = entry.join([source.read(found.stored[name]) for name in entry.theirs])
    if spec.padded is not None:
        local.zero_()
    for box in spec.rectangles(axis.rank, axis.size):
        local[box.local_slices] = whole[box.global_slices].to(local.device, local.dtype)


def size_error(class_name: str, mismatched: Mapping[str, tuple[Shape, Shape]]) -> CheckpointError:
    """The error for shapes that do not fit."""
    return CheckpointError(
        f"{class_name}: {name} has the shape {found} in the files, expected {expected}; with "
        "ignore_mismatched_sizes=True it is initialised anew"
        for name, (found, expected) in mismatched.items()
    )


def _as_named(stored: str, naming: Naming, files: Collection[str]) -> str:
    """The name that a tensor of the files would have in the model's class."""
    in_class_with_heads = any(other.startswith(naming.prefix) for other in files)
    if naming.has_heads and not in_class_with_heads:
        return naming.prefix + stored
    if not naming.has_heads and in_class_with_heads:
        return stored.removeprefix(naming.prefix)
    return stored
