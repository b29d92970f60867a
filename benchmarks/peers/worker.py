"""One process of a contestant: builds its step and runs bursts of it when asked.

    python -m benchmarks.peers.worker MODULE LAYOUT THREADS PIPE SIZES

MODULE is a module of this package, PIPE the number of an open pipe to the process that asks, SIZES
the sizes as JSON. The answers are dictionaries: first {"loss": of two steps} or {"absent": why},
then for each number of steps {"seconds": of all of them, "loss": the last, "peak": bytes}.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.peers import AbsentError
from benchmarks.peers.sizes import Sizes


def main() -> None:
    """Serve until the other side closes the pipe."""
    module, layout, threads, pipe, sizes = sys.argv[1:]
    connection = Connection(int(pipe))
    torch.set_num_threads(int(threads))
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    try:
        peer = importlib.import_module(f"benchmarks.peers.{module}")
        step = peer.build(Sizes(**json.loads(sizes)), layout)
        connection.send({"loss": [step(), step()]})
    except AbsentError as absent:
        connection.send({"absent": str(absent)})
        return
    while True:
        try:
            steps = connection.recv()
        except EOFError:
            return
        connection.send(burst(step, steps))


def burst(step: Callable[[], float], steps: int) -> dict[str, Any]:
    """Runs so many steps, beginning and ending together with the other processes."""
    loss = float("nan")
    _meet()
    start = time.perf_counter()
    for _ in range(steps):
        loss = step()
    _meet()
    taken = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": taken, "loss": loss, "peak": peak}


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
