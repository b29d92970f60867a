"""What every reader of weights offers, whatever file format lies behind it.

`StoredTensors` (this project's checkpoints), `HuggingFaceFiles` and the readers of Megatron-LM's
checkpoints all fit. Who converts or loads needs to know names, shapes and types beforehand, and
then takes one tensor after the other, so that no model ever has to fit in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The data type of every tensor, under the same names as `shapes`."""

    def read(self, name: str, /) -> torch.Tensor:
        """One tensor, read into this process' memory; the source keeps nothing of it.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: its data is damaged.
        """
