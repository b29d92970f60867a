"""Properties of the loader: workers, ranks and interruptions change no batch."""

from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron.data.loader import Batch, build_loader, collate_samples


class Squares:
    """Sample i holds i and its square."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        return {"number": np.array(index), "row": np.full(3, index**2, np.float32)}


def load(count: int, **changes: Any) -> list[Batch]:
    arguments = {
        "consumed_samples": 0,
        "micro_batch_size": 2,
        "data_rank": 0,
        "data_size": 2,
        "global_batch_size": 8,
        "num_workers": 0,
        "dataloader_type": "cyclic",
        "seed": 3,
        **changes,
    }
    return list(islice(build_loader(Squares(), **arguments), count))


def numbers(batches: list[Batch]) -> list[list[int]]:
    return [batch["number"].tolist() for batch in batches]


def test_batches_are_stacked() -> None:
    batch = load(1, dataloader_type="single")[0]
    assert batch["number"].dtype == torch.int64
    assert batch["number"].tolist() == [0, 1]
    assert batch["row"].tolist() == [[0, 0, 0], [1, 1, 1]]


def test_single_ends_with_the_last_whole_batch() -> None:
    batches = load(1000, dataloader_type="single", global_batch_size=20, micro_batch_size=5)
    assert numbers(batches) == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [20, 21, 22, 23, 24],
        [25, 26, 27, 28, 29],
    ]


@pytest.mark.parametrize("dataloader_type", ["single", "cyclic"])
def test_workers_change_nothing(dataloader_type: str) -> None:
    alone = load(12, dataloader_type=dataloader_type)
    helped = load(12, dataloader_type=dataloader_type, num_workers=2)
    assert numbers(alone) == numbers(helped)


def test_resuming_equals_going_on() -> None:
    whole = numbers(load(40))
    assert numbers(load(30, consumed_samples=5 * 8)) == whole[10:]


def test_loading_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    load(4)
    load(4, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_collation_may_be_given() -> None:
    def sums(samples: Any) -> Batch:
        return {"sum": collate_samples(samples)["number"].sum()}

    assert load(1, dataloader_type="single", collate=sums)[0]["sum"].item() == 1
