"""The samples of a step as a function of the samples that the run has consumed.

Early in training gradients agree with each other, and small batches learn as much per step as large
ones (arXiv 1812.06162). With `--rampup-batch-size START INCREMENT SAMPLES` the global batch begins
with START samples, grows by INCREMENT after each of the equal parts that SAMPLES is cut into, and
has reached `--global-batch-size` when all of them are consumed. 4 2 30 with a global batch of 8:

    samples consumed   0-14   15-29   30 and more
    samples of a step     4       6             8

A step that begins in one part and ends in the next keeps the batch it began with. There is no
state: a run that goes on from a checkpoint knows how many samples it has consumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config import TrainConfig


@dataclass(frozen=True)
class BatchRamp:
    """The course of the global batch size.

    Attributes:
        start: samples of the first step.
        increment: samples by which a step grows at a time.
        ramp: samples consumed when a step has grown to `full`; 0 where it never grows.
        full: samples of a step from then on.
    """

    start: int
    increment: int
    ramp: int
    full: int

    @classmethod
    def of(cls, train: TrainConfig, data_parallel_size: int) -> BatchRamp:
        """The course that the flags ask for."""
        full = train.global_batch(data_parallel_size)
        start, increment, ramp = train.rampup_batch_size or (full, 1, 0)
        return cls(start, increment, ramp, full)

    def at(self, samples: int) -> int:
        """The samples of the step that begins after `samples` were consumed."""
        if samples >= self.ramp:
            return self.full
        parts = (self.full - self.start) // self.increment
        return self.start + samples * parts // self.ramp * self.increment

    def steps(self, first: int, last: int) -> int:
        """The whole steps of a run from `first` to `last` consumed samples."""
        steps = 0
        while first < self.ramp and first + self.at(first) <= last:
            first += self.at(first)
            steps += 1
        return steps + (max(last - first, 0) // self.full if first >= self.ramp else 0)
