"""What a cluster is made of, as the planner reads it from a YAML file.

The files that come along lie in `hardware/`; a file of one's own has the same keys. Every number
there says where it comes from. Peak rates, bandwidths and sizes are those of a data sheet; beside
each stands the share of it that a program reaches. `megatron.planner.timing` makes seconds of them.

This file imports no torch.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron.errors import ConfigError

DIRECTORY = Path(__file__).with_name("hardware")
GIB = 1024**3

Section = TypeVar("Section")


@dataclass(frozen=True)
class Matmul:
    """How much of the peak rate a product of matrices reaches.

    A product is cut into tiles of its result, which the processors compute in waves. A tile lasts
    as long as its k steps and `start_k` more.

    Attributes:
        reached: share of the peak rate in a large product.
        start_k: what filling and emptying a processor's pipeline costs, in steps of k.
        tiles: rows and columns of the tiles to choose from, each with the rate at which it is
            computed, a share of that of the first.
    """

    reached: float
    start_k: float
    tiles: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class Attention:
    """Shares of the peak rate that fused attention reaches.

    Attributes:
        forward, backward: at long sequences.
        half_length: number of keys at which half of that is reached.
    """

    forward: float
    backward: float
    half_length: float


@dataclass(frozen=True)
class Reached:
    """Shares of a link's bandwidth, as nccl-tests counts it (bus bandwidth), in large collectives.

    An all-reduce that switches compute in passing can have more than 1. `message` is from one rank
    to another.
    """

    all_reduce: float
    all_gather: float
    reduce_scatter: float
    broadcast: float
    message: float


@dataclass(frozen=True)
class Link:
    """What connects GPUs, in one direction.

    Attributes:
        bandwidth_gb: of one GPU, in 10^9 bytes per second.
        reached: shares of it.
        latency_us: of one step of a ring or tree, microseconds.
        start_us: of a collective or message, microseconds.
    """

    bandwidth_gb: float
    reached: Reached
    latency_us: float
    start_us: float


@dataclass(frozen=True, eq=False)
class Hardware:
    """A GPU and what connects it to others; compared by identity, so that times are kept by it.

    Attributes:
        name: as a report calls it.
        memory_gib: of one GPU.
        reserved_gib: of it, for the CUDA context, NCCL's buffers and what fragmentation loses.
        gpus_per_node: that NVLink connects.
        processors: streaming multiprocessors.
        peak_tflops: dense operations per second by number format, in 10^12.
        matmul, attention: what is reached of them.
        bandwidth_gb: of the memory, in 10^9 bytes per second.
        bandwidth_reached: share of it in an operator over large tensors.
        launch_us: between the ends of an operator and the start of the next, microseconds.
        issue_us: what the host needs to issue an operator, microseconds.
        communication_processors: kept busy by a collective under way.
        nvlink: inside a node.
        network: between nodes, each GPU with its share of the adapters.
    """

    name: str
    memory_gib: float
    reserved_gib: float
    gpus_per_node: int
    processors: int
    peak_tflops: Mapping[str, float]
    matmul: Matmul
    attention: Attention
    bandwidth_gb: float
    bandwidth_reached: float
    launch_us: float
    issue_us: float
    communication_processors: int
    nvlink: Link
    network: Link

    @property
    def memory(self) -> int:
        """Bytes of one GPU."""
        return int(self.memory_gib * GIB)

    @property
    def reserved(self) -> int:
        """Bytes of `memory` that no tensor can have."""
        return int(self.reserved_gib * GIB)

    def peak_flops(self, dtype: str) -> float:
        """Dense operations per second in a number format, such as "bfloat16".

        Raises:
            ConfigError: the hardware has no such rate.
        """
        family = "float8" if dtype.startswith("float8") else dtype
        if family not in self.peak_tflops:
            known = ", ".join(self.peak_tflops)
            raise ConfigError(f"--hardware {self.name} has no rate for {dtype}, only for {known}")
        return self.peak_tflops[family] * 1e12


def names() -> tuple[str, ...]:
    """The hardware that is known by name."""
    return tuple(sorted(path.stem for path in DIRECTORY.glob("*.yaml")))


def load_hardware(name: str) -> Hardware:
    """The hardware of this name, or of the YAML file at this path.

    Raises:
        ConfigError: there is none, or the file is not as it should be: one problem for each key.
    """
    path = DIRECTORY / f"{name}.yaml" if name in names() else Path(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        close = difflib.get_close_matches(name.lower(), names(), n=1, cutoff=0.4)
        meant = f": did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"--hardware {name} is none of {', '.join(names())}, and cannot be read as a file: "
            f"{error.strerror}{meant}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hardware {name}: not YAML: {error}".replace("\n", " ")) from error
    problems: list[str] = []
    hardware = _section(Hardware, values, "", problems)
    if problems:
        raise ConfigError(f"--hardware {name}: {problem}" for problem in problems)
    assert hardware is not None
    return hardware


def _section(
    kind: type[Section], values: object, where: str, problems: list[str]
) -> Section | None:
    """An instance of a dataclass of this file; None, and what is wrong, where that fails."""
    if not isinstance(values, dict):
        problems.append(f"{where or 'the file'}: expected keys with values, found {values!r}")
        return None
    prefix = f"{where}." if where else ""
    types = typing.get_type_hints(kind)
    expected = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    before = len(problems)
    for key in values.keys() - set(expected):
        problems.append(f"{prefix}{key}: unknown, expected {', '.join(expected)}")
    made = {}
    for key in expected:
        if key in values:
            made[key] = _value(types[key], values[key], prefix + key, problems)
        else:
            problems.append(f"{prefix}{key}: missing")
    return kind(**made) if len(problems) == before else None


def _value(kind: Any, found: object, where: str, problems: list[str]) -> object:
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return _section(kind, found, where, problems)
    expected, is_right = _EXPECTED[kind]
    if not is_right(found):
        problems.append(f"{where}: expected {expected}, found {found!r}")
    return tuple(map(tuple, found)) if isinstance(found, list) else found


def _is_number(found: object) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and found > 0


def _is_count(found: object) -> bool:
    return isinstance(found, int) and _is_number(found)


def _is_mapping(found: object) -> bool:
    return isinstance(found, dict) and bool(found) and all(map(_is_number, found.values()))


def _is_tiles(found: object) -> bool:
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(t, list) and len(t) == 3 and all(map(_is_number, t)) for t in found)
    )


_EXPECTED: Mapping[Any, tuple[str, Callable[[object], bool]]] = {
    str: ("a text", lambda found: isinstance(found, str)),
    int: ("a whole number above 0", _is_count),
    float: ("a number above 0", _is_number),
    Mapping[str, float]: ("names with numbers above 0", _is_mapping),
    tuple[tuple[int, int, float], ...]: ("a list of [rows, columns, speed]", _is_tiles),
}
