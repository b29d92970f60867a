"""The one configuration of a run: five frozen sections whose fields are the command line's flags.

A field declares everything that is known about its flag: type, default, help text, bounds and
choices. The command line (`megatron.arguments`), `--config-file`, the configuration saved with a
run and the page docs/flags.md are all made from these fields. Nothing changes a configuration;
`dataclasses.replace` makes another.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from megatron.config.data import DataConfig
from megatron.config.flags import Flag, flags_of
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.train import TrainConfig
from megatron.errors import ConfigError

__all__ = [
    "SECTIONS",
    "Config",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "TrainConfig",
    "all_flags",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """All that describes a run."""

    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    data: DataConfig
    train: TrainConfig

    def with_vocab_size(self, vocab_size: int) -> "Config":
        """This configuration with the tokenizer's number of tokens."""
        return dataclasses.replace(
            self, model=dataclasses.replace(self.model, vocab_size=vocab_size)
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section and field: numbers, texts, booleans, lists and None."""
        return {
            section: {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(getattr(self, section)).items()
            }
            for section in SECTIONS
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The configuration that `to_dict` described; raises ConfigError naming all it lacks."""
        problems = [f"unknown section {name}" for name in values if name not in SECTIONS]
        flat: dict[str, Any] = {}
        for section, kind in SECTIONS.items():
            given = values.get(section, {})
            if not isinstance(given, Mapping):
                problems.append(f"section {section} is no mapping")
                continue
            flags = {each.name: each for each in flags_of(kind)}
            problems += [
                f"unknown {name} in section {section}" for name in given if name not in flags
            ]
            for name, each in flags.items():
                try:
                    if name in given:
                        flat[name] = each.read(given[name])
                    elif each.required:
                        problems.append(f"{each.option} is required")
                except ConfigError as error:
                    problems += error.problems
        if problems:
            raise ConfigError(problems)
        return cls.from_flags(flat)

    @classmethod
    def from_flags(cls, values: Mapping[str, Any]) -> "Config":
        """The configuration with these values by field name, whatever section they belong to."""
        return cls(
            **{
                section: kind(
                    **{f.name: values[f.name] for f in flags_of(kind) if f.name in values}
                )
                for section, kind in SECTIONS.items()
            }
        )

    def to_flags(self) -> dict[str, Any]:
        """The value of every field by its name, which is unique over all sections."""
        return {
            each.name: getattr(getattr(self, section), each.name)
            for section, kind in SECTIONS.items()
            for each in flags_of(kind)
        }

    def to_yaml(self) -> str:
        """Text that `from_yaml` and `--config-file` read."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> "Config":
        """The configuration that `to_yaml` wrote; raises ConfigError."""
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"not YAML: {error}".replace("\n", " ")) from error
        if not isinstance(values, dict):
            raise ConfigError(f"expected the sections {', '.join(SECTIONS)}")
        return cls.from_dict(values)


SECTIONS: dict[str, type] = {
    field.name: typing.cast(type, field.type) for field in dataclasses.fields(Config)
}


def all_flags() -> dict[str, Flag]:
    """Every flag by its field name, in the order of the sections."""
    return {each.name: each for kind in SECTIONS.values() for each in flags_of(kind)}
