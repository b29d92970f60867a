"""Under tensor and pipeline parallelism every rank returns what transformers 4.34.0 returned.

Every case of the fixture runs on one of the layouts; `make parity-hf` runs any number on all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.hf.old.compare import check, disagreements
from tests.hf.old.fixture import case_directory, case_names

pytest.importorskip("safetensors")

LAYOUTS = [(2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_every_rank_has_the_whole_outputs_and_gradients(tensor: int, pipeline: int) -> None:
    names = case_names()[LAYOUTS.index((tensor, pipeline)) :: len(LAYOUTS)]
    directories = [case_directory(name) for name in names]
    for rank, wrong in enumerate(
        run_distributed(tensor * pipeline, _disagreements, directories, tensor, pipeline)
    ):
        assert not wrong, f"rank {rank}:\n" + "\n".join(wrong)


def _disagreements(directories: list[Path], tensor: int, pipeline: int) -> list[str]:
    return [
        f"{directory.name}: {line}"
        for directory in directories
        for line in disagreements(check(directory, tensor, pipeline))
    ]
