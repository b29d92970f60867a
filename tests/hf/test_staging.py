"""Over gloo a model of the family on an accelerator computes what it does on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.hf import MegatronBertForMaskedLM, parallel
from megatron.hf.parallel import parallel_state
from megatron.mpu import ParallelState
from tests.distributed import distributed
from tests.hf.tiny import config_of
from tests.mpu.accelerator import all_tensors_on_an_accelerator

pytest.importorskip("safetensors")


def _tensors(state: ParallelState, directory: Path) -> list[Tensor]:
    """What passes between ranks: initial values, results, gradients, weights put together."""
    torch.manual_seed(state.rank)
    model = MegatronBertForMaskedLM(config_of("megatron"), parallel_state=state)
    ids = torch.arange(20).view(2, 10)
    result = model(ids, labels=ids, output_hidden_states=True)
    result.loss.backward()
    model.save_pretrained(directory)
    gradients = [parameter.grad for parameter in model.parameters()]
    whole = model.state_dict().values()
    return [result.logits, *result.hidden_states, *gradients, *whole]


@distributed(4)
def test_a_model_on_four_ranks_is_the_same(tmp_path: Path) -> None:
    state = parallel_state(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    expected = _tensors(state, tmp_path / "expected")
    with all_tensors_on_an_accelerator() as used:
        found = _tensors(state, tmp_path / "found")
    assert used >= {"all_reduce", "broadcast", "send", "recv"}
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_ranks_share_an_accelerator_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert parallel._device() == torch.device("cuda", 1)
    assert chosen == [1]
