"""What a check is, and the list that each topic's file fills with its own."""

from collections.abc import Callable

from megatron.errors import ConfigError

Check = Callable[..., None]


class Checks(list[Check]):
    """The checks of one topic, in the order in which they are tried."""

    def add(self, function: Check) -> Check:
        """Decorates a function as one of the checks."""
        self.append(function)
        return function


def exclude_each_other(*options: tuple[str, object]) -> None:
    """Raises ConfigError where more than one of these options, with their values, is asked for."""
    given = [option for option, value in options if value]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other")


def divides(option: str, value: int, by_option: str, by: int) -> None:
    """Raises ConfigError where `value`, which `option` states, is no multiple of `by`."""
    if value % by:
        raise ConfigError(f"{option} {value} is not divisible by {by_option} {by}")
