"""One mistake, one message, however many ranks meet it.

The launcher ends all ranks as soon as one of them has failed, within a fraction of a second. So the
rank that should speak fails at once, and the others wait a moment before they do: of a mistake that
all ranks find, rank 0 speaks; of a connection that broke, the rank that has left it, and knows why.
Whoever waits and is still there after that has something of its own to say.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.errors import ConfigError, UserError

SECONDS_FOR_THE_OTHERS = 5.0


@contextmanager
def one_voice(rank: int, world_size: int) -> Iterator[None]:
    """Delays the exceptions of the `with` block that another rank may be about to explain."""
    try:
        yield
    except ConfigError:
        raise  # left to rank 0 by the command itself
    except (UserError, OSError):
        if rank > 0:
            time.sleep(SECONDS_FOR_THE_OTHERS)
        raise
    except RuntimeError:
        if world_size > 1:
            time.sleep(SECONDS_FOR_THE_OTHERS)
        raise
