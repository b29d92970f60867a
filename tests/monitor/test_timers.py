"""Timers, on the CPU."""

import time

import torch

from megatron.monitor import Timers, across_ranks


def test_a_section_collects_all_its_visits_until_it_is_read() -> None:
    timers = Timers(torch.device("cpu"))
    for _ in range(3):
        with timers.section("forward"):
            time.sleep(0.002)
    with timers.section("optimizer"):
        pass
    seconds = timers.read()
    assert list(seconds) == ["forward", "optimizer"]
    assert seconds["forward"] >= 0.006
    assert seconds["optimizer"] >= 0
    assert timers.read() == {}


def test_least_and_most_over_ranks_take_one_reduction() -> None:
    others = {"step": 4.0, "forward": 0.5}
    calls = []

    def reduce_max(vector: torch.Tensor) -> torch.Tensor:
        calls.append(vector.dtype)
        theirs = torch.tensor([others["forward"], others["step"]], dtype=torch.float64)
        return torch.maximum(vector, torch.cat([-theirs, theirs]))

    spread = across_ranks({"step": 3.0, "forward": 1.0}, reduce_max)
    assert spread == {"forward": (0.5, 1.0), "step": (3.0, 4.0)}
    assert calls == [torch.float64]
