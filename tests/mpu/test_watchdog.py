"""A rank that waits too long says for what, has all ranks say it, and ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist

from megatron.mpu import watchdog
from megatron.mpu.watchdog import Watchdog, group_timeout, start_watchdog, stop_watchdog, waiting

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 100


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def installed() -> Iterator[Watchdog]:
    start_watchdog(3, timedelta(minutes=10))
    found = watchdog._watchdog
    assert found is not None
    yield found
    stop_watchdog()


def minutes(number: float, rank: int = 3, store: dist.Store | None = None) -> Watchdog:
    return Watchdog(rank, timedelta(minutes=number), store=store)


def test_a_wait_is_too_long_when_the_minutes_are_over(clock: Clock) -> None:
    dog = minutes(10)
    with dog.waiting("rank 3 waits for the others"):
        clock.now += 600
        assert not dog.look()
        clock.now += 1
        assert dog.look()
    assert not dog.look()


def test_the_oldest_wait_is_told(clock: Clock) -> None:
    dog = minutes(0.5)
    with ExitStack() as outer:
        outer.enter_context(dog.waiting("rank 3 waits for a"))
        clock.now += 2.25
        with dog.waiting(lambda: "rank 3 waits for b"):
            clock.now += 1
            assert dog.report() == (
                "rank 3 waits for a; 3.2 s by now, --distributed-timeout-minutes is 0.5"
            )
            outer.close()
            assert dog.report().startswith("rank 3 waits for b; 1.0 s by now, ")


def test_what_is_waited_for_is_put_into_words_only_when_it_is_told() -> None:
    def what() -> str:
        told.append("x")
        return "rank 3 waits"

    dog, told = minutes(1), list[str]()
    with dog.waiting(what):
        assert not dog.look()
        assert told == []
        dog.report()
    assert told == ["x"]


def test_a_wait_that_fails_is_over(clock: Clock) -> None:
    dog = minutes(1)
    with pytest.raises(RuntimeError), dog.waiting("rank 3 waits"):
        raise RuntimeError("the other has died")
    clock.now += 100
    assert not dog.look()


def test_a_rank_that_does_not_wait_says_where_it_is() -> None:
    report = minutes(1).report()
    assert report.startswith("rank 3 waits for no other rank; it is in ")
    assert __file__ in report


def test_one_alarm_reaches_all_ranks(clock: Clock) -> None:
    store = dist.HashStore()
    first, second = minutes(1, 0, store), minutes(1, 1, store)
    with first.waiting("rank 0 waits for rank 1"):
        assert not second.look()
        clock.now += 61
        assert not second.look()
        assert first.look()
        assert second.look()


class Gone(dist.Store):
    """A store whose process has ended."""

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("gone")

    def set(self, key: str, value: str) -> None:
        raise dist.DistNetworkError("gone")


def test_a_rank_whose_store_is_gone_looks_after_itself(clock: Clock) -> None:
    dog = minutes(1, store=Gone())
    with dog.waiting("rank 3 waits"):
        assert not dog.look()
        clock.now += 61
        assert dog.look()


def test_the_thread_says_it_and_then_ends_the_process() -> None:
    done: list[object] = []
    dog = Watchdog(3, timedelta(milliseconds=20), say=done.append, leave=done.append)
    dog.start()
    with dog.waiting("rank 3 waits for godot"):
        dog._thread.join(LIMIT_SECONDS)
    line, code = done
    assert str(line).startswith("error: rank 3 waits for godot; ")
    assert code == 1


def test_a_thread_that_finds_nothing_ends_when_it_is_stopped() -> None:
    done: list[object] = []
    dog = Watchdog(3, timedelta(minutes=1), say=done.append, leave=done.append)
    dog.start()
    with dog.waiting("rank 3 waits"):
        pass
    dog.stop()
    assert not dog._thread.is_alive()
    assert done == []


def test_without_a_watchdog_waiting_does_nothing() -> None:
    with waiting("rank 3 waits"), waiting(lambda: "rank 3 waits"):
        pass


def test_waiting_is_told_to_the_installed_watchdog(installed: Watchdog) -> None:
    with waiting("rank 3 waits for x"):
        assert installed.report().startswith("rank 3 waits for x; ")
    assert "waits for no other rank" in installed.report()


def test_process_groups_time_out_later_than_the_watchdog() -> None:
    for seconds in (0.1, 3.0, 600.0):
        timeout = timedelta(seconds=seconds)
        looks = Watchdog(0, timeout).seconds_between_looks
        assert group_timeout(timeout) > timeout + timedelta(seconds=4 * looks + 10)


class Event:
    """An event that the device passes when it is told to."""

    made: ClassVar[list[Event]] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.passed = False
        self.made.append(self)

    def record(self) -> None:
        assert not self.passed

    def query(self) -> bool:
        return self.passed


def test_a_wait_of_the_device_outlasts_the_hosts(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog.torch, "Event", Event)
    monkeypatch.setattr(Event, "made", [])
    dog = Watchdog(3, timedelta(minutes=1), device=torch.device("cuda", 1))
    for name in "abc":
        with dog.waiting(f"rank 3 waits for {name}"):
            clock.now += 40
    assert dog.look()
    assert dog.report().startswith("rank 3 waits for a; 120 s by now, ")
    Event.made[0].passed = Event.made[1].passed = True
    assert not dog.look()
    assert dog.report().startswith("rank 3 waits for c; 40 s by now, ")
    clock.now += 21
    assert dog.look()
    Event.made[2].passed = True
    assert not dog.look()
    with pytest.raises(RuntimeError), dog.waiting("rank 3 waits for d"):
        raise RuntimeError("the other has died")
    assert len(Event.made) == 3
    assert not dog._pending


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_a_wait_lasts_until_the_device_is_done() -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    dog = Watchdog(3, timedelta(minutes=1), device=device)
    values = torch.randn(8192, 8192, device=device)
    with dog.waiting("rank 3 waits for the product"):
        for _ in range(100):
            values = values @ values
    assert dog.report().startswith("rank 3 waits for the product; ")
    torch.accelerator.synchronize()
    assert "waits for no other rank" in dog.report()
    assert not dog._pending
    for _ in range(1000):
        with dog.waiting("rank 3 waits for a sum"):
            values.sum()
    torch.accelerator.synchronize()
    with dog.waiting("rank 3 waits for nothing"):
        pass
    assert len(dog._pending) < 1000


ABSENT = """
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.arguments import parse_config
from megatron.mpu.watchdog import group_timeout, start_watchdog, waiting

config = parse_config(prog="absent.py")
timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
dist.init_process_group("gloo", timeout=group_timeout(timeout))
rank = dist.get_rank()
start_watchdog(rank, timeout)

def absent():
    signal.pause()

if rank == 1:
    absent()
with waiting(lambda: f"rank {rank}, stage 0, waits for the sum over ranks 0, 1"):
    dist.all_reduce(torch.zeros(1))
"""


def test_a_rank_that_never_comes_is_found_by_the_others(tmp_path: Path) -> None:
    script = tmp_path / "absent.py"
    script.write_text(ABSENT)
    flags = """--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8
        --max-position-embeddings 8 --micro-batch-size 1 --train-iters 1 --lr 0.1
        --distributed-timeout-minutes 0.05"""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script), *flags.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode != 0
    said = sorted(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert len(said) == 2, done.stderr
    assert re.fullmatch(
        r"error: rank 0, stage 0, waits for the sum over ranks 0, 1; [\d.]+ s by now, "
        "--distributed-timeout-minutes is 0.05",
        said[0],
    )
    assert said[1].startswith("error: rank 1 waits for no other rank; it is in absent, ")
    assert str(script) in said[1]
