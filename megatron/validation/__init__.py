"""Every combination of flags that is impossible, found before any work starts.

A check is a function whose parameters are named after the flags it looks at (and `world_size`); it
raises ConfigError with one line for each problem, in the flags' own names. A check is left out
while one of its flags is missing or wrong in itself, so that one mistake gives one message.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.config import Config, all_flags
from megatron.errors import ConfigError
from megatron.validation import files, layout, models, network, pipeline, run, speed
from megatron.validation.checks import Check

__all__ = ["CHECKS", "find_problems", "problems_of", "validate"]

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


def find_problems(
    values: Mapping[str, Any],
    world_size: int,
    *,
    leaving_out: Sequence[Check] = (),
) -> list[str]:
    """All problems among the flags that could be read; `values` may lack some.

    Checks may be left out, to be tried by themselves (`problems_of`).
    """
    problems: list[str] = []
    sound: dict[str, Any] = {"world_size": world_size}
    for flag in all_flags().values():
        if flag.name in values:
            found = list(flag.problems(values[flag.name]))
            problems += found
            if not found:
                sound[flag.name] = values[flag.name]
    return problems + problems_of([c for c in CHECKS if c not in leaving_out], sound)


def problems_of(checks: Sequence[Check], sound: Mapping[str, Any]) -> list[str]:
    """What these checks find in flags that are right in themselves, and `world_size`."""
    problems: list[str] = []
    for check in checks:
        wanted = inspect.signature(check).parameters
        if wanted.keys() <= sound.keys():
            try:
                check(**{name: sound[name] for name in wanted})
            except ConfigError as error:
                problems += error.problems
    return problems
