"""What a dataset of samples offers to a loader and to a blend."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt

Sample = Mapping[str, npt.NDArray[Any]]


class SampleDataset(Protocol):
    """Samples by their number."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, the same in every process."""
