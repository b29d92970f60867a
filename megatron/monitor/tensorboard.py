"""Records as TensorBoard curves."""

from __future__ import annotations

from pathlib import Path

from megatron.errors import ConfigError
from megatron.monitor.metrics import Record


class TensorBoardWriter:
    """Writes each quantity of a record as a curve over the iterations, in `directory`.

    An earlier run's points after `last_iteration` are hidden by TensorBoard itself. Raises
    ConfigError where the tensorboard package is not installed.
    """

    def __init__(self, directory: Path, queue_size: int, last_iteration: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            problem = "--tensorboard-dir needs the package tensorboard: pip install tensorboard"
            raise ConfigError([problem]) from None
        purge_step = last_iteration + 1 if last_iteration else None
        self._writer = SummaryWriter(str(directory), purge_step, queue_size)

    def write(self, record: Record) -> None:
        """Adds one point to each quantity's curve."""
        step = record["iteration"]
        for key, value in record.items():
            if key != "iteration" and value is not None:
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Writes what is queued and closes the files."""
        self._writer.close()
