"""Runs end early after the same step on every rank."""

import faulthandler
import os
import signal

import torch.distributed as dist

from megatron.mpu import ParallelState, Topology
from megatron.training.stopping import Stopping
from tests.distributed import distributed
from tests.training.tiny import tiny_config


def _stopping(state: ParallelState, **train: object) -> Stopping:
    return Stopping(tiny_config(train={"log_interval": 2, **train}).train, state)


def test_goes_on_where_nothing_is_asked_for() -> None:
    stopping = _stopping(ParallelState.single())
    assert [stopping(iteration) for iteration in range(1, 9)] == [None] * 8


def test_exit_interval_ends_at_its_multiples() -> None:
    stopping = _stopping(ParallelState.single(), exit_interval=3)
    assert stopping(2) is None
    assert stopping(3) == "--exit-interval 3 is reached"


def test_duration_ends_at_the_next_report() -> None:
    stopping = _stopping(ParallelState.single(), exit_duration_in_mins=1e-9)
    assert stopping(1) is None
    assert stopping(2) == "--exit-duration-in-mins is over"


@distributed(4)
def test_a_signal_to_one_rank_ends_all_of_them() -> None:
    stopping = _stopping(ParallelState.create(Topology(4, tensor=2, pipeline=2)))
    if dist.get_rank() == 3:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stopping(1) is None
    assert stopping(2) == "SIGUSR1 asked for it"
    faulthandler.register(signal.SIGUSR1)  # as the pool of test processes had it
