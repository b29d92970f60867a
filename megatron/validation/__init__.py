"""Every combination of flags that is impossible, found before any work starts.

A check is a function whose parameters are named after the flags it looks at (and `world_size`); it
raises ConfigError with one line for each problem, in the flags' own names. A check is left out
while one of its flags is missing or wrong in itself, so that one mistake gives one message.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from megatron.config import Config, all_flags
from megatron.errors import ConfigError
from megatron.validation import files, layout, models, network, pipeline, run, speed

__all__ = ["CHECKS", "find_problems", "validate"]

CHECKS = (
    *models.checks,
    *network.checks,
    *layout.checks,
    *pipeline.checks,
    *run.checks,
    *speed.checks,
    *files.checks,
)


def validate(config: Config, world_size: int) -> list[str]:
    """All problems of a configuration that is to run on `world_size` ranks."""
    return find_problems(config.to_flags(), world_size)


def find_problems(values: Mapping[str, Any], world_size: int) -> list[str]:
    """All problems among the flags that could be read; `values` may lack some."""
    problems: list[str] = []
    sound: dict[str, Any] = {"world_size": world_size}
    for flag in all_flags().values():
        if flag.name in values:
            found = list(flag.problems(values[flag.name]))
            problems += found
            if not found:
                sound[flag.name] = values[flag.name]
    for check in CHECKS:
        wanted = inspect.signature(check).parameters
        if wanted.keys() <= sound.keys():
            try:
                check(**{name: sound[name] for name in wanted})
            except ConfigError as error:
                problems += error.problems
    return problems
