"""Several processes on the one GPU, over gloo, train what one process trains.

Correctness of the device's code under parallelism, with the kernels on: NCCL would want a GPU for
each process, gloo goes through the host's memory.
"""

from __future__ import annotations

import os
import socket
import traceback
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch

from benchmarks.gpu.context import Context, processes
from benchmarks.gpu.measuring import first_line
from benchmarks.gpu.models import TASKS, Training, batches, configuration
from megatron.config import Config
from megatron.mpu import ParallelState
from megatron.training.initialize import finalize, initialize
from megatron.training.trainer import Trainer

STEPS = 5
LEARNING_RATE = 1e-3
# Relative, of the losses. In bfloat16 a step's sums are rounded in another order.
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-3}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP=2": {"tensor_model_parallel_size": 2},
    "TP=2, sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP=2": {"pipeline_model_parallel_size": 2},
}
LAYOUTS_OF_A_TRIAL = ("one process", "TP=2")
STEPS_OF_A_TRIAL = 2

Losses = dict[str, list[float]]


def run(context: Context) -> None:
    """Trains each model on each layout; raises RuntimeError where losses differ."""
    names = LAYOUTS_OF_A_TRIAL if context.smoke else tuple(LAYOUTS)
    with ExitStack() as stack:
        teams = {name: stack.enter_context(_Team(name, context)) for name in names}
        losses = {name: team.losses() for name, team in teams.items()}
    reference = losses["one process"]
    wrong = []
    for layout, runs in losses.items():
        for what, found in runs.items():
            pairs = zip(found, reference[what], strict=True)
            off = max(abs(one / other - 1) for one, other in pairs)
            agrees = off <= TOLERANCES[what.partition(", ")[2]]  # false for NaN
            name = f"{what}, {layout}"
            context.record(name, {"losses": found, "off_by": off, "agrees": agrees})
            if not agrees:
                wrong.append(name)
    if wrong:
        raise RuntimeError(f"other losses than on one process: {'; '.join(wrong)}")


def configurations(layout: str, context: Context) -> dict[str, Config]:
    """What is trained on a layout, by kind of model and precision."""
    made = {}
    for kind in ("gpt",) if context.smoke else TASKS:
        config = configuration(
            model(kind, context.smoke), kernels=context.kernels, device_type=context.device_type
        )
        flags = LAYOUTS[layout]
        backend = "gloo" if flags else None
        for dtype in TOLERANCES:
            made[f"{kind}, {dtype}"] = replace(
                config,
                model=replace(config.model, bf16=dtype == "bfloat16"),
                parallel=replace(config.parallel, distributed_backend=backend, **flags),
                optimizer=replace(config.optimizer, lr=LEARNING_RATE),
            )
    return made


def model(kind: str, smoke: bool) -> Training:
    """What is trained."""
    sized = Training(
        name="agreement",
        kind=kind,
        layers=4,
        hidden=256,
        heads=8,
        sequence=128,
        vocabulary=1024,
        micro_batch=4,
        micro_batches=4,
        goal=0.0,
    )
    return sized.tiny() if smoke else sized


class _Team:
    """The processes of a layout; a context that ends them."""

    def __init__(self, layout: str, context: Context) -> None:
        self._context = context
        self._layout = layout
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> _Team:
        method = processes(self._context.device_type)
        configs = configurations(self._layout, self._context)
        size = 2 if LAYOUTS[self._layout] else 1
        port = _free_port()
        for rank in range(size):
            ours, theirs = method.Pipe()
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
            arguments = (theirs, configs, self._context.smoke, place)
            process = method.Process(  # type: ignore[attr-defined]
                target=_rank, args=arguments, daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def losses(self) -> Losses:
        """Of every run; raises RuntimeError."""
        return [self._answer(pipe) for pipe in self._pipes][-1]

    def _answer(self, pipe: Connection) -> Losses:
        if not pipe.poll(max(self._context.seconds_left, 0.0)):
            raise RuntimeError(f"{self._layout}: no answer in time")
        try:
            answer: Losses | str = pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self._layout}: a rank ended without an answer") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self._layout}: {answer}")
        return answer


def _rank(pipe: Connection, configs: dict[str, Config], smoke: bool, place: dict[str, int]) -> None:
    """The life of a rank: answers with its losses, or with what went wrong."""
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    if smoke:
        torch.set_num_threads(1)
    try:
        state = initialize(next(iter(configs.values())))
        pipe.send({name: _train(config, state, smoke) for name, config in configs.items()})
        finalize(state)
    except Exception as error:  # it is reported
        traceback.print_exc()
        pipe.send(first_line(error))


def _train(config: Config, state: ParallelState, smoke: bool) -> list[float]:
    kind = config.model.model_type
    trainer = Trainer(config, TASKS[kind](config), state)
    made = batches(model(kind, smoke), config)
    losses = []
    for _ in range(STEPS_OF_A_TRIAL if smoke else STEPS):
        parts = trainer.over_ranks(trainer.step(made).parts)
        losses.append(parts.sum().item())
    trainer.finish()
    return losses


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
