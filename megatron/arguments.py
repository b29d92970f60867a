"""From a command line to a configuration, or to all that is wrong with it.

In order: the words are cut into flags and their values; the lines of `--config-file` are put before
them, so that the command line wins; old names become new ones, and what they imply is put before
all that is said outright; each value is read as its flag's type; combinations are checked. Every
step goes on after a mistake, and all mistakes are reported together. (argparse stops at the first
one, which is why it is not used.)

Flags are never abbreviated. A switch may be given a value, `--fp16 false`, to overrule a file.
"""

import difflib
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron.config import SECTIONS, Config, all_flags
from megatron.config.dry_run import DryRunConfig
from megatron.config.flags import flags_of
from megatron.errors import ConfigError, exit_with
from megatron.flag_reference import help_text
from megatron.old_flags import OLD_FLAGS, Obsolete, Renamed, StandsFor, Unavailable
from megatron.validation import CHECKS, files, find_problems, problems_of

_HELP = ("-h", "--help")
_CONFIG_FILE = "config-file"


@dataclass(frozen=True)
class Command:
    """What a command line asks for.

    Attributes:
        config: of the run.
        dry_run: whether it is only to be planned, and how.
        notes: a line about each old name.
        problems: files that are missing; only a dry run goes on with any.
        conflicts: what flags say against each other or against the number of ranks, so that no
            plan can be made; only a dry run goes on with any, to find what else is wrong.
    """

    config: Config
    dry_run: DryRunConfig
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Given:
    """A flag as it was given: its name without dashes, its value or words, the line of a file."""

    name: str
    raw: object
    where: str = ""


def parse_config(
    argv: list[str] | None = None,
    *,
    prog: str,
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
    required: Iterable[str] = (),
) -> Config:
    """The configuration that a command line asks for; ends the process with 2 where it is wrong.

    argv: the words after the program's name, by default this process's; defaults: values by field
    name that this program uses in place of the fields' own, and `model_type`, where it is among
    them, is the only one that it trains; required: names of fields that this program cannot do
    without. The number of ranks is torchrun's WORLD_SIZE.
    """
    command = parse_command(
        argv, prog=prog, description=description, defaults=defaults, required=required
    )
    if command.dry_run.dry_run:
        exit_with(ConfigError(f"--dry-run: {prog} has none"))
    return command.config


def parse_command(
    argv: list[str] | None = None,
    *,
    prog: str,
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
    required: Iterable[str] = (),
) -> Command:
    """What a command line asks for, a dry run included; otherwise as `parse_config`."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word in _HELP for word in argv):
        width = min(shutil.get_terminal_size().columns, 110)
        sys.stdout.write(help_text(prog, description, defaults, tuple(required), width))
        sys.exit(0)
    try:
        command = read_command(
            argv,
            defaults=defaults,
            required=required,
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
        )
    except ConfigError as error:
        exit_with(error)
    if os.environ.get("RANK", "0") == "0":
        for note in command.notes:
            print(f"{prog}: {note}", file=sys.stderr)
    return command


def read_config(
    argv: list[str],
    *,
    defaults: Mapping[str, Any] | None = None,
    required: Iterable[str] = (),
    world_size: int = 1,
) -> tuple[Config, list[str]]:
    """The configuration that `argv` asks for, and a line about each old name in it.

    defaults, required: as for `parse_config`.
    Raises ConfigError with every problem that `argv` and its configuration file have.
    """
    command = read_command(argv, defaults=defaults, required=required, world_size=world_size)
    if command.dry_run.dry_run:
        raise ConfigError("--dry-run is for a program that trains")
    return command.config, list(command.notes)


def read_command(
    argv: list[str],
    *,
    defaults: Mapping[str, Any] | None = None,
    required: Iterable[str] = (),
    world_size: int = 1,
) -> Command:
    """What `argv` asks for; a dry run needs neither data nor files.

    defaults, required: as for `parse_config`.
    Raises ConfigError with every problem that `argv` and its configuration file have; but for a
    dry run only where some flag cannot be made sense of by itself.
    """
    problems: list[str] = []
    defaults = defaults or {}
    words = _with_files(_split(argv, problems), problems)
    dry_run = _dry_run(words, problems)
    if dry_run.dry_run:
        required, world_size = (), dry_run.world_size or world_size
    given = [each for each in words if not _is_of_dry_run(each)]
    current, notes = _renamed(given, problems)
    flags = all_flags()
    values = {name: flag.default for name, flag in flags.items() if not flag.required}
    values |= defaults
    unreadable = set()
    for each in current:
        flag = flags[_field_name(each.name)]
        try:
            values[flag.name] = flag.read(each.raw)
            unreadable.discard(flag.name)
        except ConfigError as error:
            unreadable.add(flag.name)
            problems += (each.where + line for line in error.problems)
    absent = {name for name in required if values.get(name) in (None, ())}
    values = {name: values[name] for name in values.keys() - unreadable - absent}
    problems += (
        f"{flag.option} is required"
        for name, flag in flags.items()
        if name not in values and name not in unreadable
    )
    trained = defaults.get("model_type")
    if trained is not None and values.get("model_type", trained) != trained:
        problems.append(f"--model-type {values['model_type']}: this program trains {trained}")
        del values["model_type"]
    if dry_run.dry_run and not _names_data(values):
        values["tokenizer_type"] = None  # its files are not asked for
    if not dry_run.dry_run:
        problems += find_problems(values, world_size)
        if problems:
            raise ConfigError(dict.fromkeys(problems))
        return Command(Config.from_flags(values), dry_run, tuple(notes))
    wrong = find_problems(values, world_size, leaving_out=CHECKS)
    conflicts = find_problems(values, world_size, leaving_out=files.checks)[len(wrong) :]
    missing = problems_of(files.checks, values)
    if problems or wrong:
        raise ConfigError(dict.fromkeys([*problems, *wrong, *conflicts, *missing]))
    return Command(
        Config.from_flags(values), dry_run, tuple(notes), tuple(missing), tuple(conflicts)
    )


def _dry_run(given: list[Given], problems: list[str]) -> DryRunConfig:
    flags = {flag.option[2:]: flag for flag in flags_of(DryRunConfig)}
    asked = [each for each in given if each.name in flags]
    values = {}
    for each in asked:
        flag = flags[each.name]
        try:
            value = flag.read(each.raw)
            found = [*flag.problems(value)]
        except ConfigError as error:
            found = [*error.problems]
        problems += (each.where + line for line in found)
        if not found:
            values[flag.name] = value
    # With --dry-run false, one that a file asks for is called off, whatever else the file says.
    if not any(each.name == "dry-run" for each in asked):
        problems += (f"{each.where}--{each.name} is for --dry-run" for each in asked)
    return DryRunConfig(**values)


def _is_of_dry_run(given: Given) -> bool:
    return given.name in {flag.option[2:] for flag in flags_of(DryRunConfig)}


def _names_data(values: Mapping[str, Any]) -> bool:
    """Whether data or a tokenizer's files are given."""
    names = "data_path", "vocab_file", "merge_file", "tokenizer_model"
    return any(values.get(name) for name in names)


def _split(argv: list[str], problems: list[str]) -> list[Given]:
    """Cut `--flag value ...` and `--flag=value` apart."""
    given: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            given.append((name, [value] if equals else []))
        elif given:
            given[-1][1].append(word)
        else:
            problems.append(f"expected a flag, found {word!r}")
    return [Given(name, words) for name, words in given]


def _with_files(given: list[Given], problems: list[str]) -> list[Given]:
    """The flags of the configuration files, then those given beside them."""
    from_files: list[Given] = []
    others = []
    for each in given:
        if each.name != _CONFIG_FILE:
            others.append(each)
        elif isinstance(each.raw, list) and len(each.raw) == 1:
            from_files += _read_file(each.raw[0], problems)
        else:
            problems.append("--config-file expects one file")
    return from_files + others


def _read_file(path: str, problems: list[str]) -> list[Given]:
    """The flags of a YAML file: by name at the top level, or under the names of the sections."""
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            problems.append(f"{path}:1: expected lines such as num-layers: 24")
            return []
        return _flags_of_mapping(loader, root, path, problems)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text in UTF-8"
        problems.append(f"--config-file {path}: {reason}")
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problems.append(f"{path}:{line}: not YAML: {error.problem}")
    except yaml.YAMLError as error:
        problems.append(f"{path}: not YAML: {' '.join(str(error).split())}")
    return []


def _flags_of_mapping(
    loader: yaml.SafeLoader, mapping: yaml.MappingNode, path: str, problems: list[str]
) -> list[Given]:
    given: list[Given] = []
    lines: dict[str, int] = {}
    for key, value in mapping.value:
        name = _dashed(str(key.value))
        line = key.start_mark.line + 1
        if name in SECTIONS and isinstance(value, yaml.MappingNode):
            given += _flags_of_mapping(loader, value, path, problems)
            continue
        if name in lines:
            problems.append(f"{path}:{line}: {key.value} stands in line {lines[name]} already")
        lines[name] = line
        where = f"{path}:{line}: "
        given.append(Given(name, loader.construct_object(value, deep=True), where))
    return given


def _renamed(given: list[Given], problems: list[str]) -> tuple[list[Given], list[str]]:
    """The flags under today's names, and a line about each old one; unknown names are problems."""
    known = {flag.option[2:] for flag in all_flags().values()}
    current: list[Given] = []
    implied: list[Given] = []
    notes: dict[str, None] = {}  # a set that keeps its order
    for each in given:
        match None if each.name in known else OLD_FLAGS.get(_dashed(each.name)):
            case Renamed(also=also) if also and each.raw is None:
                pass  # left empty in a file, it asks for none of them
            case Renamed() as old:
                notes[f"--{each.name} {old.note}"] = None
                current.append(Given(old.to, each.raw, each.where))
                implied += _flags(old.also, each.where)
            case StandsFor() as old:
                asked = _switched(each, problems)
                notes |= dict.fromkeys([f"--{each.name} {old.note}"] if asked else [])
                implied += _flags(old.flags, each.where) if asked else []
            case Obsolete() as old:
                notes[f"--{each.name} {old.note}"] = None
            case Unavailable() as old:
                if _asked_for(each.raw, old):
                    problems.append(f"{each.where}--{each.name} {old.note}")
            case None if each.name in known:
                current.append(each)
            case None:
                problems.append(f"{each.where}unknown flag --{each.name}{_did_you_mean(each.name)}")
    return implied + current, list(notes)


def _flags(values: Mapping[str, str], where: str) -> list[Given]:
    return [Given(name, value, where) for name, value in values.items()]


def _switched(given: Given, problems: list[str]) -> bool:
    """Whether a switch is on."""
    value = str(_single(given.raw)).lower()
    if value not in ("[]", "true", "false", "none"):
        problems.append(
            f"{given.where}--{given.name} expects no value, or true or false, found "
            f"{_single(given.raw)!r}"
        )
    return value in ("[]", "true")


def _asked_for(raw: object, old: Unavailable) -> bool:
    value = _single(raw)
    return value is not None and str(value).lower() != old.harmless


def _single(raw: object) -> object:
    """The one word of a command line, or the value of a file."""
    return raw[0] if isinstance(raw, list) and len(raw) == 1 else raw


def _did_you_mean(name: str) -> str:
    flags = (*all_flags().values(), *flags_of(DryRunConfig))
    names = {flag.option[2:] for flag in flags} | {*OLD_FLAGS, _CONFIG_FILE}
    close = difflib.get_close_matches(_dashed(name), sorted(names - {name}), n=1)
    return f": did you mean --{close[0]}?" if close else ""


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _field_name(name: str) -> str:
    return name.replace("-", "_")
