"""What a flag is: a dataclass field that says its help, its bounds and its choices.

`flag(...)` declares one in a section of `megatron.config`; `flags_of(section)` reads them back as
`Flag`s, which turn what stands on a command line or in a YAML file into a value (`Flag.read`) and
say what is wrong with a value (`Flag.problems`).
"""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.errors import ConfigError


def flag(
    help: str,
    *,
    default: Any = dataclasses.MISSING,
    choices: tuple[str, ...] = (),
    bounds: str = "",
    metavar: str = "",
    topic: str = "",
) -> Any:
    """A field of a section that is a flag of the command line.

    help: one sentence without its full stop; bounds: the interval of allowed values, "[0, 1)";
    metavar: what stands for the value in `--help`, by default the type's; topic: the heading of
    this flag and of those after it.
    """
    metadata = {"help": help, "choices": choices, "bounds": bounds}
    metadata |= {"metavar": metavar, "topic": topic}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag: a field of a section, and all that is declared about it."""

    name: str  # "num_layers"
    topic: str
    help: str
    type: type  # int, float, str or bool; of one element where `many`
    many: bool  # the value is a tuple
    optional: bool  # None is a value
    default: Any  # dataclasses.MISSING where the flag must be given
    choices: tuple[str, ...]
    bounds: str
    metavar: str

    @property
    def option(self) -> str:
        """The flag as it stands on a command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def is_switch(self) -> bool:
        return self.type is bool

    def read(self, raw: object) -> Any:
        """The value written as `raw`: the words of a command line, or a value of a YAML file.

        Raises ConfigError where it is not of this flag's type; bounds are left to `problems`.
        """
        if raw is None or self._is_none(raw):
            if self.optional:
                return None
            raise ConfigError(f"{self.option} has no value, expected {self._expected}")
        if self.is_switch and raw == []:
            return True  # `--fp16`
        if self.many:
            return self._read_many(raw)
        if isinstance(raw, list):
            if len(raw) != 1:
                found = f"found {len(raw)}: {' '.join(map(str, raw))}" if raw else "found none"
                raise ConfigError(f"{self.option} expects one value, {found}")
            (raw,) = raw
        return self._read_one(raw)

    def _is_none(self, raw: object) -> bool:
        """Whether `raw` takes back what a file or a script has stated; text may be called none."""
        is_text = self.type is str and not self.choices
        return self.optional and not is_text and raw in ("none", ["none"])

    def problems(self, value: Any) -> Iterator[str]:
        """What is wrong with a value of this flag's type: its bounds and its choices."""
        if value is None:
            return
        for one in value if self.many else (value,):
            if self.choices and one not in self.choices:
                yield f"{self.option} {one} is none of {', '.join(self.choices)}"
            if self.bounds and not in_interval(one, self.bounds):
                yield f"{self.option} {one} is outside {self.bounds}"

    def _read_many(self, raw: object) -> tuple[Any, ...]:
        """The elements of a list; numbers may also be parted by commas, as in `2,3`."""
        elements = raw if isinstance(raw, list) else [raw]
        if self.optional and not elements:  # None, not an empty tuple, says that nothing is stated
            raise ConfigError(f"{self.option} expects {self._expected}, found nothing")
        if self.type is not str:
            elements = [
                part
                for element in elements
                for part in (element.split(",") if isinstance(element, str) else [element])
            ]
        return tuple(self._read_one(element) for element in elements)

    def _read_one(self, raw: object) -> Any:
        value = _converted(raw, self.type)
        if value is None:
            raise ConfigError(f"{self.option} expects {self._expected}, found {raw!r}")
        return value

    @property
    def _expected(self) -> str:
        if self.choices:
            return "one of " + ", ".join(self.choices)
        return {
            bool: "no value, or true or false",
            int: "an integer",
            float: "a number",
            str: "text",
        }[self.type]


def _converted(raw: object, to: type) -> Any:
    """`raw` as an int, float, bool or str, or None where it is not one."""
    if to is bool:
        return {"true": True, "false": False}.get(str(raw).lower())
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        return None
    if to is str:
        return str(raw)
    if to is int:
        return int(raw) if re.fullmatch(r"[+-]?\d+", str(raw)) else None
    try:
        number = float(raw)  # YAML takes 1e-4, without a point, for text
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def in_interval(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as "[0, 1)" or "[1, inf)"."""
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


@functools.cache
def flags_of(section: type) -> tuple[Flag, ...]:
    """The flags that a section declares, in their order."""
    found: list[Flag] = []
    for field in dataclasses.fields(section):
        kind, many, optional = _parsed_type(field.type)
        topic = field.metadata["topic"] or found[-1].topic
        found.append(
            Flag(
                name=field.name,
                topic=topic,
                help=field.metadata["help"],
                type=kind,
                many=many,
                optional=optional,
                default=field.default,
                choices=field.metadata["choices"],
                bounds=field.metadata["bounds"],
                metavar=field.metadata["metavar"],
            )
        )
    return tuple(found)


def _parsed_type(annotation: Any) -> tuple[type, bool, bool]:
    """Of an annotation such as `tuple[int, ...] | None`: int, is a tuple, may be None."""
    optional = isinstance(annotation, types.UnionType)
    if optional:
        (annotation,) = (a for a in typing.get_args(annotation) if a is not types.NoneType)
    many = typing.get_origin(annotation) is tuple
    return (typing.get_args(annotation)[0] if many else annotation), many, optional
