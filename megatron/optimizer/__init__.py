"""Gradients in flat buffers, precision, and the optimizer's step."""

from megatron.optimizer.gradients import GradientBuffers
from megatron.optimizer.lr_schedule import LearningRateSchedule, build_schedule
from megatron.optimizer.optimizer import Optimizer, StepResult, build_optimizer

__all__ = [
    "GradientBuffers",
    "LearningRateSchedule",
    "Optimizer",
    "StepResult",
    "build_optimizer",
    "build_schedule",
]
