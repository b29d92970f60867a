"""What `--data-path` says: one dataset, or several with the weight of each in front."""

import math
from collections.abc import Sequence

from megatron.errors import ConfigError


def parse_blend(values: Sequence[str]) -> tuple[tuple[float, str], ...]:
    """Weight and prefix of each dataset: `["3", "a", "7", "b"]` gives `((3.0, "a"), (7.0, "b"))`.

    Weights are as they were given, and 1 where a single prefix stands without. Raises ConfigError.
    """
    if len(values) == 1:
        return ((1.0, values[0]),)
    if len(values) % 2:
        raise ConfigError(
            f"--data-path expects one prefix, or a weight in front of each; found {len(values)} "
            f"values: {' '.join(values)}"
        )
    pairs = [
        (_weight(word), word, prefix)
        for word, prefix in zip(values[::2], values[1::2], strict=True)
    ]
    problems = [
        f"--data-path expects a positive weight before {prefix}, found {word!r}"
        for weight, word, prefix in pairs
        if weight is None
    ]
    if problems:
        raise ConfigError(problems)
    return tuple((weight, prefix) for weight, _, prefix in pairs if weight is not None)


def _weight(word: str) -> float | None:
    try:
        weight = float(word)
    except ValueError:
        return None
    return weight if 0 < weight < math.inf else None
