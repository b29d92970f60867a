"""What a kind of pretraining brings to the loop: its data, its network and its loss.

The loop knows the order of things and nothing of what is trained. A task says how samples are made
and counted, what the network of a pipeline stage is, and how one micro-batch becomes a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron.config import Config
from megatron.data.loader import Batch, SampleDataset
from megatron.model import Float16Module, MegatronModule
from megatron.mpu import ParallelState, Stage
from megatron.pipeline.p2p import TensorSpec

Parts = dict[str, Tensor]
StageModel = MegatronModule | Float16Module


@dataclass(frozen=True)
class SampleCounts:
    """How many samples a run will take from each split."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class Datasets:
    """The samples of the three splits; None for a split that is empty or never asked for."""

    train: SampleDataset | None
    validation: SampleDataset | None
    test: SampleDataset | None


class Task(Protocol):
    """One kind of pretraining."""

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """The names of the loss's parts, each ending in "_loss", in the order of reporting."""

    @property
    def host_fields(self) -> frozenset[str]:
        """The fields of a batch that stay on the host; all others go to the device."""

    @property
    def tokenizer_files(self) -> Sequence[Path]:
        """The tokenizer's files, kept beside each checkpoint."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens, without padding."""

    def datasets(
        self, config: Config, counts: SampleCounts, say: Callable[[str], None]
    ) -> Datasets:
        """The samples of a run; every rank calls it, `say` takes a line about each split."""

    def blank_batch(self, config: Config, device: torch.device) -> Batch:
        """A micro-batch of the shapes and types of a run's, for planning; its values say nothing.

        Whatever its documents may spare is counted in: each sequence is one, and full.
        """

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """The stages of the whole model, virtual ones included; raises ConfigError."""

    def build_model(self, config: Config, state: ParallelState, stage: Stage) -> StageModel:
        """The network of one pipeline stage."""

    def activation(self, config: Config, state: ParallelState, stage: Stage) -> TensorSpec:
        """What a rank of this stage sends to the next one for one micro-batch."""

    def denominators(self, batch: Batch) -> Tensor:
        """What each part of the loss is a mean over, counted in a micro-batch: float64 [parts]."""

    def forward_step(self, chunk: nn.Module, batch: Batch, totals: Tensor) -> tuple[Tensor, Parts]:
        """Runs one micro-batch through one stage.

        `totals`, float64 [parts], are the denominators of the whole global batch. Returns the
        activation to send and no parts; on the last stage the loss and its parts, both already
        divided by `totals`, so that they add up over micro-batches and data-parallel ranks.
        """

    def tokens_per_sample(self, config: Config) -> int:
        """Tokens of one sample, padding included."""

    def flops_per_sample(self, config: Config) -> float:
        """Floating-point operations that training on one sample cannot do without."""
