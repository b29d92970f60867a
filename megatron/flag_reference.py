"""What is told about the flags: the text of `--help` and the page docs/flags.md.

`python -m megatron.flag_reference > docs/flags.md` writes the page anew.
"""

import dataclasses
import itertools
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.config import all_flags
from megatron.config.dry_run import DryRunConfig
from megatron.config.flags import Flag, flags_of
from megatron.old_flags import OLD_FLAGS, Obsolete, OldFlag, Renamed, StandsFor, Unavailable

_CONFIG_FILE_HELP = (
    "take flags from a YAML file, as lines such as num-layers: 24; "
    "those of the command line go before them"
)
_HELP_COLUMN = 38
_INTRODUCTION = """\
# Flags

Made from the fields of `megatron/config/` by `python -m megatron.flag_reference`.

A flag is written `--name value`, or as a line `name: value` in the file that `--config-file` names;
what stands on the command line wins over the file. Switches take no value; `--fp16 false` turns off
what a file has turned on, and `none` takes back a number or a choice that has no default. Flags are
never abbreviated, and a flag given twice has its last value.
"""
_OLD_NAMES = """
## Old names

Flags of Megatron-LM's launch scripts that are no flags here. Those with another name set it; those
that stand for others set them, unless these are given as well; those without effect are accepted,
each with one line on stderr. What is not available is an error.

| flag | what becomes of it |
|---|---|
"""


def help_text(
    prog: str,
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
    required: tuple[str, ...] = (),
    width: int = 100,
) -> str:
    """The answer to `--help`: flags under their topics, in two columns of `width` letters.

    defaults, required: as for `megatron.arguments.parse_config`.
    """
    defaults = defaults or {}
    flags = [_with_default(flag, defaults, required) for flag in _told_of()]
    usage = [f"{flag.option} {_metavar(flag)}" for flag in flags if flag.required]
    lines = _wrapped(
        f"usage: {prog} ", " ".join(usage) + " [--config-file FILE] [--flag value ...]", width
    )
    lines += ["", *textwrap.wrap(description, width)] if description else []
    lines += ["", "General", *_entry("--help", "show this text", width)]
    lines += _entry("--config-file FILE", _CONFIG_FILE_HELP, width)
    for topic, members in itertools.groupby(flags, key=lambda flag: flag.topic):
        lines += ["", topic]
        for flag in members:
            text = f"{flag.help} ({_note(flag)})" if _note(flag) else flag.help
            lines += _entry(f"{flag.option} {_metavar(flag)}".rstrip(), text, width)
    return "\n".join(lines) + "\n"


def _told_of() -> tuple[Flag, ...]:
    """The flags of a run, and those of a dry run."""
    return (*all_flags().values(), *flags_of(DryRunConfig))


def _with_default(flag: Flag, defaults: Mapping[str, Any], required: tuple[str, ...]) -> Flag:
    """The flag as one program sees it."""
    default = defaults.get(flag.name, flag.default)
    if flag.name in required and default in (None, ()):
        default = dataclasses.MISSING
    return dataclasses.replace(flag, default=default)


def _note(flag: Flag) -> str:
    if flag.required:
        return "required"
    shown = _shown(flag.default)
    return f"default {shown}" if shown else ""


def reference_page() -> str:
    """The text of docs/flags.md."""
    parts = [_INTRODUCTION]
    for topic, members in itertools.groupby(_told_of(), key=lambda flag: flag.topic):
        parts.append(f"\n## {topic}\n\n| flag | default | range | meaning |\n|---|---|---|---|\n")
        for flag in members:
            value = f" {_metavar(flag)}" if _metavar(flag) else ""
            default = "*required*" if flag.required else _shown(flag.default)
            cells = (f"`{flag.option}{value}`", default, flag.bounds, _cell(flag.help))
            parts.append(f"| {' | '.join(cells)} |\n")
    parts.append(_OLD_NAMES)
    parts += (f"| `--{name}` | {_cell(_fate(old))} |\n" for name, old in sorted(OLD_FLAGS.items()))
    return "".join(parts)


def _fate(old: OldFlag) -> str:
    match old:
        case Renamed(to, also):
            return f"sets `--{to}`" + (f" and {_stated(also)}" if also else "")
        case StandsFor(flags):
            return f"stands for {_stated(flags)}"
        case Obsolete(reason):
            return f"no effect: {reason}"
        case Unavailable(what):
            return f"not available: {what}"


def _stated(flags: Mapping[str, str]) -> str:
    return ", ".join(f"`--{name} {value}`" for name, value in flags.items())


def _metavar(flag: Flag) -> str:
    """What stands for the value of a flag; empty for a switch."""
    if flag.is_switch:
        return ""
    if flag.choices:
        return "{" + ",".join(flag.choices) + "}"
    return flag.metavar or {int: "N", float: "X", str: "TEXT"}[flag.type]


def _shown(default: Any) -> str:
    """A default as a user would write it; empty where a flag has none."""
    if default is None or default is False or default == ():
        return ""
    if isinstance(default, float):
        return f"{default:g}" if float(f"{default:g}") == default else f"{default:.0f}"
    return str(default)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _entry(head: str, text: str, width: int) -> Iterator[str]:
    """A flag and its help; the help starts on a line of its own where the flag is too long."""
    first = f"  {head:<{_HELP_COLUMN - 4}}  "
    if len(first) > _HELP_COLUMN:
        option, _, value = head.partition(" ")
        if len(head) > width - 2:  # many choices
            yield f"  {option}"
            yield from _wrapped("    ", value.replace(",", ", "), width)
        else:
            yield f"  {head}"
        first = " " * _HELP_COLUMN
    yield from _wrapped(first, text, width)


def _wrapped(first: str, text: str, width: int) -> list[str]:
    """Lines that start with `first`, the later ones indented as far."""
    return textwrap.wrap(
        text,
        max(width, len(first) + 30),
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    sys.stdout.write(reference_page())
