"""This project's steps of training beside those of its peers, burst after burst in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.machine import MATRIX
from benchmarks.gpu.models import TRAININGS, Training
from benchmarks.gpu.rivals import Rival
from benchmarks.gpu.steps import PRODUCTS, Spec

OURS, PRODUCT = "megatron", "product"
ROUNDS = 5
BURST_SECONDS = 0.7
MOST_STEPS = 10
# What a contest takes: below it none is begun.
SHORTEST = 30.0


def run(context: Context) -> None:
    """A contest for each model, the most wanted first, as far as time goes."""
    trainings = one_of_each_kind() if context.smoke else TRAININGS
    if context.smoke and context.rehearse:
        trainings = trainings[:1]
    for training in trainings:
        if context.seconds_left < SHORTEST:
            context.record(training.name, {"absent": "no time was left"})
            continue
        context.record(training.name, contest(training, context))
        print(training.name, flush=True)


def one_of_each_kind() -> tuple[Training, ...]:
    """Tiny ones, for a trial."""
    kinds = {training.kind: training.tiny() for training in TRAININGS}
    return tuple(kinds[kind] for kind in sorted(kinds))


def entrants(training: Training, context: Context) -> list[Spec]:
    """Who takes part, in the order in which they are built."""
    base = Spec(contestant=OURS, training=training, device_type=context.device_type)
    peers = [replace(base, contestant="transformers")]
    if training.kind == "gpt":
        peers.append(replace(base, contestant="plain"))
    if context.rehearse:
        return peers
    with_kernels = replace(base, kernels=context.kernels)
    ours = [with_kernels, base]
    if not context.smoke:
        ours.insert(0, replace(with_kernels, cuda_graphs=True))
    if training.kind == "bert":
        ours.insert(0, replace(with_kernels, packed=True))
    return [*peers, replace(base, contestant=PRODUCT), *ours]


def contest(training: Training, context: Context) -> dict[str, Any]:
    """Build, measure, and say what came of it."""
    rivals = [Rival(spec) for spec in entrants(training, context)]
    with ExitStack() as stack:
        for rival in rivals:
            stack.enter_context(rival)
        start(rivals, context)
        if not context.rehearse:
            measure([rival for rival in rivals if rival.absent is None], context)
    return figures(training, rivals)


def start(rivals: Sequence[Rival], context: Context) -> None:
    """Build the peers at once, since they compile for long, then ours one after the other.

    Each process takes the most memory while it is built. Of ours, the next one is built only where
    the memory that is free holds one more.
    """
    # The last seconds are for measuring.
    deadline = time.monotonic() + max(context.seconds_left - 10, 5)
    peers = [rival for rival in rivals if rival.spec.contestant != OURS]
    for rival in peers:
        rival.build()
    for rival in peers:
        rival.ready(deadline)
    needed = 0.0
    for rival in rivals:
        if rival.spec.contestant != OURS:
            continue
        if 1.2 * needed > free_memory(context):
            rival.absent = "there is no memory for one more"
            continue
        rival.build()
        rival.ready(deadline)
        needed = max(needed, rival.peak)


def free_memory(context: Context) -> float:
    """Bytes of the device that nobody has taken."""
    return float("inf") if context.smoke else float(torch.cuda.mem_get_info()[0])


def measure(rivals: Sequence[Rival], context: Context) -> None:
    """Rounds of bursts, in an order that turns; the first tells how many steps a burst has."""
    rounds = 1 if context.smoke else ROUNDS
    counts = {}
    for rival in rivals:
        seconds = rival.burst(1, 0)
        if rival.seconds.pop(0, None) is not None:
            counts[rival.spec] = min(max(round(BURST_SECONDS / seconds), 1), MOST_STEPS)
    for number in range(1, rounds + 1):
        turn = number % len(rivals)
        for rival in (*rivals[turn:], *rivals[:turn]):
            if rival.absent is None:
                rival.burst(counts[rival.spec], number)
        if context.seconds_left < 0 and number > 1:
            return


def figures(training: Training, rivals: Sequence[Rival]) -> dict[str, Any]:
    """Medians of all that is reported, and ratios within a round."""
    measured = [rival for rival in rivals if rival.seconds and rival.absent is None]
    limit = next((rival for rival in measured if rival.spec.contestant == PRODUCT), None)
    size = MATRIX if training in TRAININGS else 64
    found: dict[str, Any] = {
        "contestants": {},
        "absent": {rival.spec.title: rival.absent for rival in rivals if rival.absent is not None},
        "goal": training.goal,
        "tokens": training.tokens,
    }
    if limit is not None:
        rate = PRODUCTS * 2.0 * size**3 / statistics.median(limit.seconds.values())
        found["matmul_tflops"] = rate / 1e12
    for rival in measured:
        if rival is not limit:
            found["contestants"][rival.spec.title] = _row(training, rival, limit, size)
    ours = [rival for rival in measured if rival.spec.contestant == OURS]
    if ours:
        best = min(ours, key=lambda rival: statistics.median(rival.seconds.values()))
        found["best"] = best.spec.title
        found["ratios"] = {
            rival.spec.title: _faster(best, rival)
            for rival in measured
            if rival.spec.contestant not in (OURS, PRODUCT)
        }
    return found


def _row(training: Training, rival: Rival, limit: Rival | None, size: int) -> dict[str, Any]:
    seconds = statistics.median(rival.seconds.values())
    row = {
        "tokens_per_second": training.tokens / seconds,
        "seconds": sorted(rival.seconds.values()),
        "model_tflops": training.flops() / seconds / 1e12,
        "peak_gib": rival.peak / 2**30,
        "losses": rival.losses,
    }
    if limit is not None:
        per_second = _faster(rival, limit) / (PRODUCTS * 2.0 * size**3)
        row["share_of_matmul"] = training.flops() * per_second
        necessary = training.flops() - training.attention_flops_ahead()
        row["share_without_what_is_masked"] = necessary * per_second
    return row


def _faster(one: Rival, other: Rival) -> float:
    """How much faster: the median over the rounds of the other's seconds over the one's."""
    common = one.seconds.keys() & other.seconds.keys()
    return statistics.median(other.seconds[i] / one.seconds[i] for i in common)
