"""A training recorded in processes of its own."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessException

from megatron.config import Config
from megatron.errors import ConfigError, UserError
from megatron.mpu import ParallelState
from megatron.training.batches import training_batches
from megatron.training.initialize import finalize, initialize
from megatron.training.task import Batch, SampleCounts, Task
from megatron.training.trainer import Trainer
from tools.parity.recording import RankRecord, Recording, assemble, record
from tools.parity.samples import own_micro_batches, synthetic_samples
from tools.parity.tasks import TASKS

Batches = Callable[[int, int], list[Batch]]


def record_in_processes(config: Config, ranks: int, steps: int) -> Recording:
    """What the training of ``config`` on ``ranks`` processes of this machine comes to.

    Raises:
        UserError: one of them has found a mistake of the user.
        ProcessException: one of them failed.
    """
    with tempfile.TemporaryDirectory(prefix="parity-") as directory:
        try:
            torch.multiprocessing.spawn(
                _rank, (config, ranks, steps, _free_port(), Path(directory)), nprocs=ranks
            )
        except ProcessException as error:
            mistakes = sorted(Path(directory).glob("*.mistake"))
            if not mistakes:
                raise
            raise UserError(mistakes[0].read_text().splitlines()) from error
        # Written by processes of this program a moment ago, in a directory nobody else can enter.
        records = [
            pickle.loads((Path(directory) / f"{rank}.record").read_bytes()) for rank in range(ranks)
        ]
    return assemble(records)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rank(rank: int, config: Config, ranks: int, steps: int, port: int, directory: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if ranks > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    try:
        state = initialize(config)
        result = record_rank(config, state, steps)
        finalize(state)
    except UserError as error:
        (directory / f"{rank}.mistake").write_text("\n".join(error.problems))
        raise
    (directory / f"{rank}.record").write_bytes(pickle.dumps(result))


def record_rank(config: Config, state: ParallelState, steps: int) -> RankRecord:
    """Train on this rank, on the data of --data-path or on random tokens."""
    task = TASKS[config.model.model_type](config)
    trainer = Trainer(config, task, state)
    result = record(trainer, steps, _batches(config, task, trainer, steps))
    trainer.finish()
    return result


def _batches(config: Config, task: Task, trainer: Trainer, steps: int) -> Batches:
    data = trainer.state.data
    if not config.data.data_path:

        def synthetic(step: int, size: int) -> list[Batch]:
            samples = synthetic_samples(config, size, seed=1000 * config.train.seed + step)
            return own_micro_batches(config, samples, data.rank, data.size)

        return synthetic
    counts = SampleCounts(train=steps * trainer.ramp.full, validation=0, test=0)
    datasets = task.datasets(config, counts, lambda line: None)
    stream = training_batches(trainer, datasets.train)

    def real(step: int, size: int) -> list[Batch]:
        wanted = trainer.num_micro_batches(size)
        taken = list(islice(stream, wanted))
        if len(taken) < wanted:
            raise ConfigError(f"--data-path holds too few samples for {steps} steps")
        return taken

    return real
