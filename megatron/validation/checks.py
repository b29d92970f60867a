"""What a check is, and the list that each topic's file fills with its own."""

from collections.abc import Callable, Iterable, Sequence

from megatron.errors import ConfigError, UserError

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


def mistakes_of(check: Callable[[], Iterable[str] | None]) -> list[str]:
    """The lines that a check returns, and those of the user's mistake that it raises."""
    found: list[str] = []
    try:
        found.extend(check() or ())
    except (UserError, OSError) as error:
        found += lines_of(error)
    return found


def lines_of(error: UserError | OSError) -> Sequence[str]:
    """What a user is told of an error."""
    if isinstance(error, UserError):
        return error.problems
    return [f"{error.filename}: {error.strerror}" if error.filename else str(error)]
