"""Save, and be killed by SIGKILL at every change to the file system that saving makes, in turn.

Run as a process of its own, because it forks: `python -m tests.checkpoint.killed_saves DIRECTORY`.
For each situation, a child saves and kills itself just before its n-th change; the parent then
checks that a complete checkpoint, old or new, is what is loaded, also after a second kill, and that
the next save works and leaves nothing behind. n grows until the child survives. Prints the number
of kills.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from megatron.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from megatron.mpu import ParallelState, ShardSpec
from tests.checkpoint.support import make_config

STATE = ParallelState.single()
CONFIG = make_config()
SHAPES = {"weight": (5, 3), "optimizer.mean.weight": (5, 3), "bias": (4,)}
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile", "open")


def save(directory: Path, iteration: int, value: float) -> None:
    tensors = [(k, torch.full(s, value), ShardSpec(k, s)) for k, s in SHAPES.items()]
    run_state = {"value": value, "iteration": iteration}
    files = [directory.parent / "vocab.txt"]
    save_checkpoint(
        directory, iteration, tensors, run_state, config=CONFIG, state=STATE, files=files
    )


def load(directory: Path) -> tuple[int, float] | None:
    """Iteration and value of the checkpoint that is loaded, after a check that it is all of one."""
    if find_checkpoint(directory, STATE) is None:
        return None
    tensors = [(k, torch.zeros(s), ShardSpec(k, s)) for k, s in SHAPES.items()]
    run_state = load_checkpoint(directory, tensors, config=CONFIG, state=STATE)
    for key, tensor, _ in tensors:
        assert (tensor == run_state["value"]).all(), key
    return run_state["iteration"], run_state["value"]


def killed_at(n: int, directory: Path, action: Callable[[], None]) -> bool:
    """Whether a child that does `action` was killed at its n-th change in `directory`."""
    child = os.fork()
    if child == 0:
        changes = 0

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal changes
            if event in CHANGES and _changes_something(event, arguments, directory):
                changes += 1
                if changes == n:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            action()
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def _changes_something(event: str, arguments: tuple[object, ...], directory: Path) -> bool:
    if event == "open":
        flags = arguments[2]
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR):
            return False
    if event in ("os.remove", "os.rmdir") and arguments[-1] != -1:
        return True  # relative to an open directory: shutil.rmtree at work
    return any(str(a).startswith(str(directory)) for a in arguments)


# What was saved before the save that is killed; the save that is killed comes last.
SITUATIONS: dict[str, list[tuple[int, float]]] = {
    "first save": [(1, 10.0)],
    "later save": [(1, 10.0), (2, 20.0)],
    "the latest again": [(1, 10.0), (1, 11.0)],
    "an earlier one again": [(1, 10.0), (2, 20.0), (1, 11.0)],
}


def check(directory: Path, saves: list[tuple[int, float]]) -> int:
    """Kill the last of `saves` everywhere; returns at how many places."""
    *before, last = saves
    rng = random.Random(str(saves))
    for n in itertools.count(1):
        shutil.rmtree(directory, ignore_errors=True)
        for iteration, value in before:
            save(directory, iteration, value)
        killed = killed_at(n, directory, functools.partial(save, directory, *last))
        found = load(directory)
        old = before[-1] if before else None
        assert found in ((old, last) if killed else (last,)), (n, found)

        again = (last[0], last[1] + 1)
        m = rng.randint(1, 25)
        killed_at(m, directory, functools.partial(save, directory, *again))
        assert load(directory) in (found, again), (n, m, load(directory))

        save(directory, 3, 30.0)
        assert load(directory) == (3, 30.0), n
        names = sorted(p.name for p in directory.iterdir())
        assert not [name for name in names if name.startswith(".")], (n, names)
        if not killed:
            return n - 1
    raise AssertionError


if __name__ == "__main__":
    root = Path(sys.argv[1])
    (root / "vocab.txt").write_text("[PAD]\n")
    # What a process has written survives its death, whether the disk has it yet or not.
    os.fsync = lambda _: None  # type: ignore[assignment]
    for name, saves in SITUATIONS.items():
        kills = check(root / "checkpoints", saves)
        assert kills > 10, name
        print(f"{name}: {kills} kills")
