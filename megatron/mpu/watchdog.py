"""Says what each rank waits for when one has waited too long, and ends the run.

Ranks that wait for one another in vain all look alike from outside: nothing moves. So

1. whatever may block runs inside `with waiting("rank 5, stage 2, waits to receive ..."):`;
2. a thread of each rank looks now and then at its oldest wait, and raises an alarm in the store
   that all ranks share when that wait is older than --distributed-timeout-minutes;
3. every rank that sees the alarm says what it waits for itself, or where in the program it is, and
   ends a moment later with exit code 1. The moment lets all of them speak, since the launcher ends
   the others as soon as one has ended.

With an accelerator the host only queues a collective and goes on; the device waits. A wait then
lasts until the device has passed an event that is recorded behind it.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

What = str | Callable[[], str]

_ALARM = "alarm"
_LONGEST_LOOK = 5.0  # seconds between two looks
_SECONDS_TO_SPEAK = 2.0
_NOT_THE_USERS = (
    "<",  # frozen modules
    __file__,
    *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")},
)


class _Wait(AbstractContextManager[None]):
    """One wait, among the pending ones from its begin to its end."""

    __slots__ = ("_pending", "device", "event", "since", "what")

    def __init__(self, what: What, pending: dict[int, _Wait], device: torch.device) -> None:
        self.what = what
        self.device = device
        self.event: torch.Event | None = None
        self._pending = pending

    def __enter__(self) -> None:
        self.since = time.monotonic()
        self._pending[id(self)] = self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cpu" or error[0] is not None:
            self.drop()
            return
        self.event = torch.Event(self.device)
        self.event.record()
        # Two looks for each event that is added: the list stays as short as what is under way.
        for _ in range(2):
            oldest(self._pending)

    @property
    def is_over(self) -> bool:
        """Whether the device has passed the end of the wait, which the host has left."""
        return self.event is not None and self.event.query()

    def drop(self) -> None:
        """Forgets the wait; another thread may have done so."""
        self._pending.pop(id(self), None)

    def __str__(self) -> str:
        return self.what if isinstance(self.what, str) else self.what()


def oldest(pending: dict[int, _Wait]) -> _Wait | None:
    """The wait that has begun first and is not over; one that is over is dropped."""
    while pending:
        try:
            wait = next(iter(pending.values()))
        except (RuntimeError, StopIteration):  # another thread has just changed them
            continue
        if not wait.is_over:
            return wait
        wait.drop()
    return None


class Watchdog:
    """A thread that ends this rank when a wait of any rank is older than `timeout`.

    store: where ranks see each other's alarm; None leaves this rank to itself. say, leave: what
    prints a line and what ends the process.
    """

    def __init__(
        self,
        rank: int,
        timeout: timedelta,
        *,
        device: torch.device | str = "cpu",
        store: dist.Store | None = None,
        say: Callable[[str], object] | None = None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.rank = rank
        self.timeout = timeout.total_seconds()
        self.seconds_between_looks = min(self.timeout / 10, _LONGEST_LOOK)
        self._device = torch.device(device)
        self._store = store
        self._say = say or _to_stderr
        self._leave = leave
        self._pending: dict[int, _Wait] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Looks no more."""
        self._stopped.set()
        self._thread.join()

    def waiting(self, what: What) -> AbstractContextManager[None]:
        """See the function of this name."""
        return _Wait(what, self._pending, self._device)

    def look(self) -> bool:
        """Whether the run is to end: a wait of this rank is too old, or another rank says so."""
        wait = oldest(self._pending)
        late = wait is not None and time.monotonic() - wait.since > self.timeout
        try:
            if late and self._store is not None:
                self._store.set(_ALARM, str(self.rank))
            return late or (self._store is not None and self._store.check([_ALARM]))
        except RuntimeError:  # the store has gone with the process that held it
            return late

    def report(self) -> str:
        """What this rank waits for, or what it does where it waits for nothing."""
        wait = oldest(self._pending)
        if wait is None:
            return f"rank {self.rank} waits for no other rank; it is in {_place()}"
        seconds = time.monotonic() - wait.since
        return (
            f"{wait}; {seconds:.{0 if seconds >= 10 else 1}f} s by now, "
            f"--distributed-timeout-minutes is {self.timeout / 60:g}"
        )

    def _watch(self) -> None:
        while not self._stopped.wait(self.seconds_between_looks):
            if self.look():
                self._say(f"error: {self.report()}")
                # In this time each rank looks and says what it has to say.
                self._stopped.wait(2 * self.seconds_between_looks + _SECONDS_TO_SPEAK)
                self._leave(1)
                return


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _place() -> str:
    """Where the main thread is: its innermost line of code that is not a library's."""
    ident = threading.main_thread().ident
    assert ident is not None
    frames = traceback.extract_stack(sys._current_frames()[ident])
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_THE_USERS)] or frames
    return f"{own[-1].name}, {own[-1].filename} line {own[-1].lineno}"


_watchdog: Watchdog | None = None
_NOT_WATCHED: AbstractContextManager[None] = nullcontext()


def waiting(what: What) -> AbstractContextManager[None]:
    """Around whatever may wait for other ranks; nothing happens where no watchdog is started.

    what: a sentence such as "rank 3 waits for the sum over ranks 2, 3", or a function that makes
    it when it is needed. It is held until the device is done, and should hold no tensor.
    """
    return _NOT_WATCHED if _watchdog is None else _watchdog.waiting(what)


def start_watchdog(rank: int, timeout: timedelta, device: torch.device | str = "cpu") -> None:
    """Watches this process from now on; torch.distributed is initialised."""
    global _watchdog
    stop_watchdog()
    _watchdog = Watchdog(rank, timeout, device=device, store=_launchers_store())
    _watchdog.start()


def stop_watchdog() -> None:
    """Watches no more."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None


def group_timeout(timeout: timedelta) -> timedelta:
    """What process groups take as their own timeout where a watchdog's is `timeout`.

    Later, since their messages do not say what is waited for, and since some count from the start
    of an asynchronous collective and not from the beginning of the wait for it.
    """
    return 2 * timeout + timedelta(seconds=30)


def _launchers_store() -> dist.Store | None:
    """The store that the ranks met at, over a connection of its own.

    The one of the process group is locked while the main thread waits at it.
    """
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"watchdog/{attempt}", store)
