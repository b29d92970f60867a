"""TensorBoard curves, and what is said where the package is missing."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import ConfigError
from megatron.monitor import TensorBoardWriter


def test_each_quantity_is_a_curve(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path, queue_size=10)
    for iteration in (1, 2):
        writer.write({"iteration": iteration, "loss": 0.5 * iteration, "grad_norm": None})
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(1, 0.5), (2, 1.0)]


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary_import = builtins.__import__

    def without_tensorboard(name: str, *args: Any) -> Any:
        if "tensorboard" in name:
            raise ImportError(name)
        return ordinary_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    with pytest.raises(ConfigError, match="--tensorboard-dir needs the package tensorboard"):
        TensorBoardWriter(tmp_path, queue_size=10)
