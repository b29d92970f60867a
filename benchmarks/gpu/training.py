"""This project's steps of training beside those of its peers, burst after burst in turn.

The peers stay for a whole contest. Of this project one variant is there at a time and runs its
rounds with them: two of them would not fit beside the peers in 80 GB.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.gpu.machine import MATRIX
from benchmarks.gpu.models import TASKS, TRAININGS, Training, configuration
from benchmarks.gpu.rivals import Rival
from benchmarks.gpu.steps import PRODUCTS, Spec
from megatron.planner.dry_run import dry_run
from megatron.planner.hardware import load_hardware

PLANNED_FOR = "h100-sxm"
OURS, PRODUCT = "megatron", "product"
PEERS = ("transformers", "plain")
ROUNDS = 4
BURST_SECONDS = 0.6
MOST_STEPS = 10
# What a contest takes: below it none is begun, and so much is left to each that is still to come.
SHORTEST = 70.0
# What a variant takes that is not the first; below it none is begun.
VARIANT = 25.0


def run(context: Context) -> None:
    """A contest for each model, the most wanted first, as far as time goes."""
    trainings = one_of_each_kind() if context.smoke else TRAININGS
    if context.rehearse:
        rehearse(trainings, context)
        return
    for number, training in enumerate(trainings):
        if context.seconds_left < SHORTEST / 2:
            context.record(training.name, {"absent": "no time was left"})
            continue
        to_come = sum(each.wanted for each in trainings[number + 1 :])
        kept = 0.0 if context.smoke else SHORTEST * to_come
        deadline = max(context.deadline - kept, time.monotonic() + SHORTEST)
        context.record(training.name, contest(training, context, min(deadline, context.deadline)))
        print(training.name, flush=True)


def rehearse(trainings: Sequence[Training], context: Context) -> None:
    """Have the peers compile, all models of one peer at once: more would not fit in 80 GB."""
    for name in PEERS:
        specs = [spec for each in trainings if each.wanted for spec in peers_of(each, context)]
        rivals = [Rival(spec) for spec in specs if spec.contestant == name]
        with ExitStack() as stack:
            for rival in rivals:
                stack.enter_context(rival)
                rival.build()
            for rival in rivals:
                rival.ready(context.deadline)
                context.record(f"{rival.spec.training.name}, {name}", rival.absent or "compiled")


def one_of_each_kind() -> tuple[Training, ...]:
    """Tiny ones, for a trial."""
    kinds = {training.kind: training.tiny() for training in TRAININGS}
    return tuple(kinds[kind] for kind in sorted(kinds))


def peers_of(training: Training, context: Context) -> list[Spec]:
    """The others that train such a model."""
    names = PEERS if training.kind == "gpt" else PEERS[:1]
    return [
        Spec(contestant=name, training=training, device_type=context.device_type) for name in names
    ]


def variants(training: Training, context: Context) -> list[Spec]:
    """This project's ways of training it, the most wanted first."""
    base = Spec(contestant=OURS, training=training, device_type=context.device_type)
    with_kernels = replace(base, kernels=context.kernels)
    ours = [with_kernels]
    if training.kind == "bert":
        ours.append(replace(with_kernels, packed=True))
    if not context.smoke:
        ours.append(replace(with_kernels, cuda_graphs=True))
    return [*ours, base]


def contest(training: Training, context: Context, deadline: float) -> dict[str, Any]:
    """Build, measure, and say what came of it."""
    limit = Spec(contestant=PRODUCT, training=training, device_type=context.device_type)
    others = [Rival(spec) for spec in (limit, *peers_of(training, context))]
    ours = [Rival(spec) for spec in variants(training, context)]
    rounds = 1 if context.smoke else ROUNDS
    with ExitStack() as stack:
        for rival in (*others, *ours):
            stack.enter_context(rival)
        for rival in (*others, ours[0]):  # at once, since the peers compile for long
            rival.build()
        for rival in (*others, ours[0]):
            # The last seconds are for measuring.
            rival.ready(max(deadline - VARIANT, time.monotonic() + 5))
        for number, own in enumerate(ours):
            if number:
                if not context.smoke and deadline - time.monotonic() < VARIANT:
                    own.end("no time was left")
                    continue
                own.build()
                own.ready(deadline)
            if own.absent is None:
                measure([*others, own], range(number * rounds, (number + 1) * rounds), deadline)
                own.leave()
    return figures(training, [*others, *ours])


def measure(rivals: Sequence[Rival], rounds: Sequence[int], deadline: float) -> None:
    """Rounds of bursts of those that are present, in an order that turns."""
    for number in rounds:
        turn = number % len(rivals)
        for rival in (*rivals[turn:], *rivals[:turn]):
            if rival.absent is None:
                rival.burst(steps_of_a_burst(rival), number)
        if time.monotonic() > deadline and number > rounds[0]:
            return


def steps_of_a_burst(rival: Rival) -> int:
    """How many steps make a burst long enough to be measured."""
    if rival.step_seconds is None:
        return 1
    return min(max(round(BURST_SECONDS / rival.step_seconds), 1), MOST_STEPS)


def figures(training: Training, rivals: Sequence[Rival]) -> dict[str, Any]:
    """Medians of all that is reported, and ratios within a round."""
    measured = [rival for rival in rivals if rival.seconds]
    limit = next((rival for rival in measured if rival.spec.contestant == PRODUCT), None)
    size = MATRIX if training in TRAININGS else 64
    found: dict[str, Any] = {
        "contestants": {},
        "absent": {rival.spec.title: rival.absent for rival in rivals if rival.absent is not None},
        "goal": training.goal,
        "tokens": training.tokens,
        "planned": planned(training),
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
            if rival.spec.contestant in PEERS and best.seconds.keys() & rival.seconds.keys()
        }
    return found


def planned(training: Training) -> dict[str, Any]:
    """What a dry run says of this project's step, to be held against what is measured."""
    config = configuration(training, kernels="auto", device_type="cuda")
    plan = dry_run(config, TASKS[training.kind], 1, load_hardware(PLANNED_FOR))
    rank = plan.ranks[0]
    held = rank.weights + rank.gradients + rank.optimizer + rank.activations
    return {"for": PLANNED_FOR, "seconds": plan.step_time, "peak_gib": held / 2**30}


def _row(training: Training, rival: Rival, limit: Rival | None, size: int) -> dict[str, Any]:
    seconds = statistics.median(rival.seconds.values())
    row = {
        "tokens_per_second": training.tokens / seconds,
        "seconds": sorted(rival.seconds.values()),
        "model_tflops": training.flops() / seconds / 1e12,
        "peak_gib": rival.peak / 2**30,
        "losses": rival.losses,
    }
    if limit is not None and limit.seconds.keys() & rival.seconds.keys():
        per_second = _faster(rival, limit) / (PRODUCTS * 2.0 * size**3)
        row["share_of_matmul"] = training.flops() * per_second
        necessary = training.flops() - training.attention_flops_ahead()
        row["share_without_what_is_masked"] = necessary * per_second
    return row


def _faster(one: Rival, other: Rival) -> float:
    """How much faster: the median over the rounds of the other's seconds over the one's."""
    common = one.seconds.keys() & other.seconds.keys()
    return statistics.median(other.seconds[i] / one.seconds[i] for i in common)
