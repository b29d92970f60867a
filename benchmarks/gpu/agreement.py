"""Several processes on the one GPU, over gloo, train what one process trains.

Correctness of the device's code under parallelism, with the kernels on: NCCL would want a GPU for
each process, gloo goes through the host's memory.
"""

from __future__ import annotations

import faulthandler
import os
import re
import traceback
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed import TCPStore

from benchmarks.gpu.context import Context, processes
from benchmarks.gpu.measuring import first_line
from benchmarks.gpu.models import TASKS, Training, batches, configuration
from megatron.config import Config
from megatron.mpu import ParallelState
from megatron.training.initialize import finalize, initialize
from megatron.training.trainer import Trainer

STEPS = 5
LEARNING_RATE = 1e-3
# Relative, of the losses: a step's sums are rounded in another order.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-3}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP=2": {"tensor_model_parallel_size": 2},
    "TP=2, sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP=2": {"pipeline_model_parallel_size": 2},
}
LAYOUTS_OF_A_TRIAL = ("one process", "TP=2")
STEPS_OF_A_TRIAL = 2
SECONDS = 90.0  # of a layout

Losses = dict[str, list[float]]


def run(context: Context) -> None:
    """Trains each model on each layout; raises RuntimeError where losses differ."""
    names = LAYOUTS_OF_A_TRIAL if context.smoke else tuple(LAYOUTS)
    with ExitStack() as stack:
        teams = {name: stack.enter_context(_Team(name, context)) for name in names}
        losses, wrong = {}, []
        for name, team in teams.items():
            try:
                losses[name] = team.losses()
            except RuntimeError as error:
                context.record(name, {"absent": str(error), "agrees": False})
                wrong.append(str(error))
    reference = losses.get("one process")
    if reference is None:
        raise RuntimeError("; ".join(wrong))
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
        raise RuntimeError(f"not as on one process: {'; '.join(wrong)}")


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
        # Held here, as torchrun does it: nobody else can take its port.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(size):
            ours, theirs = method.Pipe()
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
            place["MASTER_PORT"] = self._store.port
            log = self._context.path.with_name(f"agreement-{_file_name(self._layout)}-{rank}.log")
            arguments = (theirs, configs, self._context.smoke, place, log, self._seconds)
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
        answers: dict[Connection, Losses] = {}
        while len(answers) < len(self._pipes):
            # Whoever fails says so first; the others may be waiting for it.
            asked = [pipe for pipe in self._pipes if pipe not in answers]
            ready = wait(asked, timeout=max(self._seconds, 0.0))
            if not ready:
                raise RuntimeError(f"{self._layout}: no answer in time")
            for pipe in asked:
                if pipe in ready:
                    answers[pipe] = self._answer(pipe)
        return answers[self._pipes[-1]]

    @property
    def _seconds(self) -> float:
        """That it may still take."""
        return min(SECONDS, self._context.seconds_left)

    def _answer(self, pipe: Connection) -> Losses:
        try:
            answer: Losses | str = pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self._layout}: a rank ended without an answer") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self._layout}: {answer}")
        return answer


def _rank(
    pipe: Connection,
    configs: dict[str, Config],
    smoke: bool,
    place: dict[str, int],
    log: Path,
    seconds: float,
) -> None:
    """The life of a rank: answers with its losses, or with what went wrong.

    Its words are in the log; after so many seconds, where it is stuck, too.
    """
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(seconds - 5.0, 1.0))
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
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


def _file_name(layout: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", layout.lower()))
