"""What a run tells about itself: metrics file, console, TensorBoard, timers."""

from megatron.monitor.console import Console, console_line, open_console
from megatron.monitor.metrics import MetricsFile, Record, read_metrics
from megatron.monitor.profiling import StepProfiler, annotated
from megatron.monitor.tensorboard import TensorBoardWriter
from megatron.monitor.timers import Timers, across_ranks

__all__ = [
    "Console",
    "MetricsFile",
    "Record",
    "StepProfiler",
    "TensorBoardWriter",
    "Timers",
    "across_ranks",
    "annotated",
    "console_line",
    "open_console",
    "read_metrics",
]
