"""Each rank finds its device, and the allocator is set up unless the user has done it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.training.initialize import choose_device, let_segments_expand
from tests.configs import small


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        current_accelerator=lambda: torch.device("cuda"),
    )
    monkeypatch.setattr(torch, "accelerator", accelerator)


def _device(config: Config, local_rank: int, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    return choose_device(config)


@pytest.mark.parametrize("backend", [None, "nccl", "gloo"])
def test_a_rank_has_the_device_of_its_number(
    backend: str | None, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(distributed_backend=backend)
    found = [_device(config, rank, monkeypatch) for rank in (0, 1)]
    assert found == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_ranks_share_devices_over_gloo_alone(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(distributed_backend="gloo", cuda_graphs=True)
    assert _device(config, 3, monkeypatch) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="lower --nproc-per-node"):
        _device(small(), 2, monkeypatch)


@pytest.mark.parametrize("use_cpu", [False, True])
def test_the_cpu_is_told_what_it_cannot_do(
    use_cpu: bool, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not use_cpu:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert choose_device(small(use_cpu=use_cpu)) == torch.device("cpu")
    with pytest.raises(ConfigError, match="--cuda-graphs needs a GPU, the run is on cpu"):
        choose_device(small(use_cpu=use_cpu, cuda_graphs=True))
    with pytest.raises(ConfigError, match="--distributed-backend nccl"):
        choose_device(small(use_cpu=use_cpu, distributed_backend="nccl"))


@pytest.mark.parametrize("stated", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_segments_expand_on_a_gpu_unless_the_user_says_otherwise(
    device: str, stated: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if stated is not None:
        monkeypatch.setenv(stated, "max_split_size_mb:64")
    let_segments_expand(torch.device(device))
    expected = ["expandable_segments:True"] if device == "cuda" and stated is None else []
    assert said == expected
