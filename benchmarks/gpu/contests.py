"""Every kernel beside a copy of as many bytes, PyTorch's operators and torch.compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.gpu.kernels import CASES, Case, Draw, Inputs
from benchmarks.gpu.machine import copies
from benchmarks.gpu.measuring import Action, Stopwatch, Times, contest, first_line
from megatron.ops import kernels

OURS, COPY, TORCH, COMPILED = "kernel", "copy", "torch", "compiled"

SETS = 2  # of inputs, each several times as large as any cache
BURST = 3  # times that a burst goes through the sets
ROUNDS = 11
TRIED = 3  # cases of a trial's rehearsal


def run(context: Context) -> None:
    """Measures every case; a case that fails is recorded as such, and the others go on."""
    kernels.choose(context.kernels, torch.device(context.device_type))
    # Otherwise a compiled backward pass may run only once.
    torch._functorch.config.donated_buffer = False
    rounds = 0 if context.rehearse else 1 if context.smoke else ROUNDS
    stopwatch = Stopwatch(context.device_type)
    for case in CASES[:TRIED] if context.smoke and context.rehearse else CASES:
        if context.seconds_left < 5:
            context.record(case.name, {"absent": "no time was left"})
            continue
        torch._dynamo.reset()
        try:
            for name, found in measured(case, context, stopwatch, rounds):
                context.record(name, found)
        except Exception as error:  # whatever a kernel may have done
            context.record(case.name, {"absent": first_line(error)})
        print(case.name, flush=True)
        if not context.smoke:
            torch.cuda.empty_cache()  # others may be at work beside a rehearsal


def measured(
    case: Case, context: Context, stopwatch: Stopwatch, rounds: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of a case's forward pass and, where it has one, backward pass."""
    draw = Draw(context.device_type, tiny=0 if context.smoke else None)
    torch.manual_seed(1)
    sets = [case.draw(draw) for _ in range(1 if context.smoke or context.rehearse else SETS)]
    # In a trial nothing is compiled: that takes long, and is PyTorch's own affair.
    functions = {COMPILED: case.formula if context.smoke else torch.compile(case.formula)}
    if not context.rehearse:
        functions = {OURS: case.ours, TORCH: case.torch or case.formula} | functions
    passes: list[tuple[str, Callable[..., int], Callable[..., Action]]] = [
        (case.name, case.moved, forward_action)
    ]
    if case.moved_back is not None:
        passes.append((f"{case.name}, backward", case.moved_back, backward_action))
    for name, count, action in passes:
        moved = count(*sets[0])
        contestants = {} if context.rehearse else {COPY: copies(moved // 2, context.device_type)}
        made = {key: _made(action, function, sets) for key, function in functions.items()}
        absent = {key: error for key, error in made.items() if isinstance(error, str)}
        contestants |= {key: found for key, found in made.items() if not isinstance(found, str)}
        times_over = 1 if context.smoke else BURST
        bursts = {key: list(found) * times_over for key, found in contestants.items()}
        times = contest(bursts, stopwatch, rounds)
        times |= {key: Times(absent=reason) for key, reason in absent.items()}
        found = {} if context.rehearse else figures(times, moved)
        if case.comparable and action is forward_action and not context.rehearse:
            with torch.no_grad():
                found["difference"] = difference(case.ours(*sets[0]), case.formula(*sets[0]))
        yield name, found


def _made(
    action: Callable[..., Action], function: Callable[..., Any], sets: list[Inputs]
) -> list[Action] | str:
    """An action for each set of inputs, or why there is none."""
    try:
        return [action(function, inputs) for inputs in sets]
    except Exception as error:  # whatever a peer or its compiler raises
        return first_line(error)


def forward_action(function: Callable[..., Any], inputs: Inputs) -> Action:
    """Calls the function, recording nothing."""

    def call() -> None:
        with torch.no_grad():
            function(*inputs)

    return call


def backward_action(function: Callable[..., Any], inputs: Inputs) -> Action:
    """Goes back through what the function has recorded, any number of times."""
    own = [x.detach().requires_grad_() if _is_real(x) else x for x in inputs]
    results = _flat(function(*own))
    grads = [torch.randn_like(result) for result in results]
    leaves = [x for x in own if isinstance(x, Tensor) and x.requires_grad]

    def call() -> None:
        torch.autograd.grad(results, leaves, grads, retain_graph=True)

    return call


def figures(times: dict[str, Times], moved: int) -> dict[str, Any]:
    """What is reported of a contest; raises RuntimeError where the kernel itself failed."""
    ours, copy = times[OURS], times[COPY]
    if ours.absent is not None or copy.absent is not None:
        raise RuntimeError(ours.absent or copy.absent)
    found: dict[str, Any] = {
        "bytes": moved,
        "microseconds": ours.median * 1e6,
        "gb_per_second": moved / ours.median / 1e9,
        "share_of_copy": ours.times_faster_than(copy),
    }
    for name in (TORCH, COMPILED):
        if times[name].absent is None:
            found[f"ratio_to_{name}"] = ours.times_faster_than(times[name])
        else:
            found[f"{name}_absent"] = times[name].absent
    return found


def difference(got: Any, wanted: Any) -> float:
    """|got - wanted| / |wanted|, the largest of all results; NaN counts as infinite."""
    pairs = itertools.zip_longest(_flat(got), _flat(wanted))
    return max(_relative(one, other) for one, other in pairs)


def _relative(one: Tensor, other: Tensor) -> float:
    one, other = one.float(), other.float()
    error = ((one - other).norm() / other.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _is_real(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
