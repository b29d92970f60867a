"""Run a test on several real processes that talk over gloo.

    @distributed(4)
    def test_sum():
        ...  # runs on 4 ranks, torch.distributed initialised

Importing torch takes seconds, so the processes of each world size are started once, from a fork
server that has torch imported already, and are kept for the whole run. Every call gets a fresh
default process group under a name of its own in the store; whatever groups the test made go with
it. A failing rank fails the test with its traceback, and the pool is replaced, since the other
ranks may be waiting for the one that failed.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_LIMIT_SECONDS = 150.0
_COLLECTIVE_TIMEOUT = timedelta(seconds=120)


def distributed(world_size: int) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Run the decorated test function on ``world_size`` ranks; its arguments are pickled."""

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            run_distributed(world_size, function, *args, **kwargs)

        return run

    return decorate


def run_distributed(
    world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> list[Any]:
    """Call a module-level ``function`` on every rank and return what the ranks returned."""
    pool = _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = _Pool(world_size)
    try:
        return pool.run(function, args, kwargs)
    except BaseException:
        _pools.pop(world_size).stop()
        raise


class _Pool:
    """``world_size`` worker processes and a pipe to each."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed"])
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.calls = 0
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, rank, world_size, self.store.port), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
        self.calls += 1
        call = (function.__module__, function.__qualname__, args, kwargs, self.calls)
        for pipe in self.pipes:
            pipe.send(call)
        results: list[Any] = [None] * len(self.pipes)
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        deadline = time.monotonic() + _LIMIT_SECONDS
        while waiting:
            ready = wait(list(waiting), timeout=deadline - time.monotonic())
            if not ready:
                self._dump_stacks()
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not finish")
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                error, results[rank] = pipe.recv()  # type: ignore[union-attr]
                if error:
                    raise AssertionError(f"rank {rank} of {len(self.pipes)} failed:\n{error}")
        return results

    def _dump_stacks(self) -> None:
        for process in self.processes:
            if process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


_pools: dict[int, _Pool] = {}


@atexit.register
def _stop_all() -> None:
    for pool in _pools.values():
        pool.stop()


def _work(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    """A worker: take a call, run it on a fresh process group, answer (error, result)."""
    faulthandler.register(signal.SIGUSR1)
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            module, name, args, kwargs, serial = pipe.recv()
        except EOFError:
            return
        error = result = None
        try:
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(f"call{serial}", store),
                rank=rank,
                world_size=world_size,
                timeout=_COLLECTIVE_TIMEOUT,
            )
            result = _resolve(module, name)(*args, **kwargs)
            dist.destroy_process_group()
        except BaseException:
            error = traceback.format_exc()
        # Models refer to their groups in circles; a group that stays has a thread that goes on
        # looking for messages.
        gc.collect()
        pipe.send((error, result))


def _resolve(module: str, name: str) -> Callable[..., Any]:
    """The function itself, where the module's name for it is the decorated one."""
    function = getattr(importlib.import_module(module), name)
    return getattr(function, "__wrapped__", function)
