"""Executes a pipeline schedule: exactly its table, one action after another.

A step of training on one rank:

1. The number of micro-batches decides the schedule, which is compiled once into this rank's steps
   (`megatron.pipeline.messages`).
2. A forward action waits for its activation, runs the chunk and sends the output on. What stays for
   the backward pass is the input and the output's place in the autograd graph: the output itself
   is freed as soon as it has arrived at the next stage.
3. A backward action waits for the gradient of the output, runs autograd and sends the gradient of
   the input back. On the last stage it starts from the loss, times the loss scale. Where the
   schedule splits it, the split linear layers leave their weight gradients for later
   (`megatron.mpu.deferral`), and a weight action computes them.
4. The step returns when the last action is computed. What has been sent may still be on its way:
   there is no moment at which all ranks wait for one another.

The runtime knows nothing of models: it drives any module with `set_input_tensor` through the
`forward_step` that it is given. Gradients add up in the parameters over the micro-batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron.monitor import Timers, annotated
from megatron.mpu.deferral import DeferredGradients, defer_weight_gradients
from megatron.mpu.parallel_state import ParallelState
from megatron.pipeline.actions import Action, Kind, Schedule, validate
from megatron.pipeline.messages import Step, compile_steps, edges
from megatron.pipeline.p2p import Exchange, TensorSpec

Parts = dict[str, torch.Tensor]


class Chunk(Protocol):
    """The part of a model that one stage holds."""

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        """Give the activation that the next forward pass starts from."""


class ForwardStep(Protocol):
    """Runs one micro-batch through one chunk.

    Returns the activation to send on and no parts; on the last stage the scalar loss, already
    divided by the denominators of the global batch, and its parts as detached scalars.
    """

    def __call__(
        self, chunk: Any, batch: Any, micro_batch: int, /
    ) -> tuple[torch.Tensor, Parts]: ...


class _Held(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    input: torch.Tensor | None
    output: GradientEdge | None


class _Program(NamedTuple):
    """A schedule as this rank executes it.

    Attributes:
        steps: this rank's actions with their messages.
        last_backward: each of this rank's stages with its last backward action.
        split: the backward actions whose weight gradients are actions of their own.
    """

    steps: tuple[Step, ...]
    last_backward: dict[int, Action]
    split: frozenset[Action]


class Durations:
    """How long the actions of one rank take."""

    def __init__(self, device: torch.device) -> None:
        self._timers = Timers(device)
        self._counts: Counter[str] = Counter()

    @contextmanager
    def section(self, kind: Kind) -> Iterator[None]:
        """Times an action; on an accelerator by events, without waiting for it."""
        self._counts[kind] += 1
        with self._timers.section(kind):
            yield

    def means(self) -> dict[Kind, float]:
        """Mean seconds of each kind of action since the last call; waits for the device.

        A kind that was not run is not in it; without weight actions a backward pass is a whole one.
        """
        seconds, counts = self._timers.read(), Counter(self._counts)
        self._counts.clear()
        return {Kind(kind): total / counts[kind] for kind, total in seconds.items()}


class PipelineRuntime:
    """This rank's part of a pipeline; every rank of the pipeline makes one, with the same plan.

    Args:
        chunks: the stages that this rank holds, in the model's order.
        plan: the schedule for a number of micro-batches; its ranks are the places along the
            pipeline axis. The stages and their ranks are the same for every number.
        state: the process groups.
        forward_step: how a chunk is applied to a batch.
        activation: what a stage sends to the next one; its gradient comes back in the same shape.

    Attributes:
        on_action: called before each action of a step, and with None behind the last.

    Raises:
        ValueError: the schedule is wrong or does not fit the pipeline or the chunks.
        PipelineError: a neighbour is gone, or did not come within the groups' timeout.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        plan: Callable[[int], Schedule],
        state: ParallelState,
        forward_step: ForwardStep,
        activation: Callable[[int], TensorSpec],
    ) -> None:
        self._chunks = chunks
        self._state = state
        self._forward_step = forward_step
        self._durations: Durations | None = None
        self.on_action: Callable[[Action | None], None] | None = None
        schedule = plan(1)
        self._check(schedule)
        self._placement = schedule.placement
        self._stages = schedule.stages_of(state.pipeline.rank)
        self.replan(plan)
        self._exchange = Exchange(state, activation)
        self._exchange.connect(edges(schedule))

    def replan(self, plan: Callable[[int], Schedule]) -> None:
        """Run by another plan from the next step on; every rank must change at the same step."""
        self._plan = plan
        self._programs: dict[tuple[int, bool], _Program] = {}

    @contextmanager
    def measure(self) -> Iterator[Durations]:
        """Times the actions of the steps within, which run no slower for it."""
        self._durations = Durations(self._state.device)
        try:
            yield self._durations
        finally:
            self._durations = None

    def run(
        self,
        batches: Sequence[Any],
        *,
        forward_only: bool = False,
        on_last_backward: Callable[[int], None] | None = None,
        loss_scale: torch.Tensor | float = 1.0,
    ) -> list[Parts]:
        """Run one step over the batches, each a micro-batch; any number of them.

        Args:
            batches: one per micro-batch, in order; all ranks give as many.
            forward_only: evaluate: the forward actions alone, without gradients.
            on_last_backward: called with a chunk's index just before its last backward pass.
                Weight gradients that a schedule has left for later are still outstanding then.
            loss_scale: what the loss is multiplied by before the backward pass.

        Returns:
            The loss parts of each micro-batch in order on the rank of the last stage, [] elsewhere.

        Raises:
            ValueError: the plan is wrong, or an activation is not as announced.
            PipelineError: another rank died or did not answer within the groups' timeout.
        """
        program = self._program(len(batches), forward_only)
        work = _Work(
            self._forward_step,
            dict(zip(self._stages, self._chunks, strict=True)),
            last_stage=len(self._placement) - 1,
            batches=batches,
            loss_scale=None if forward_only else loss_scale,
            split=program.split,
        )
        with torch.set_grad_enabled(not forward_only):
            for step in program.steps:
                action = step.action
                if on_last_backward and action == program.last_backward.get(action.stage):
                    on_last_backward(self._stages.index(action.stage))
                if self.on_action:
                    self.on_action(action)
                self._take(step, work)
        if self.on_action:
            self.on_action(None)
        self._exchange.end_step()
        return [work.parts[i] for i in sorted(work.parts)]

    def finish(self) -> None:
        """Wait until all that was sent has arrived.

        To be called before the groups are given up, and wherever it is known to have arrived.

        Raises:
            PipelineError: a receiver is gone.
        """
        self._exchange.flush()

    def _take(self, step: Step, work: _Work) -> None:
        for message in step.post:
            self._exchange.post(message)
        received = self._exchange.receive(step.received) if step.received else None
        for message in step.delivered:
            self._exchange.release(message)
        kind = step.action.kind
        with self._durations.section(kind) if self._durations else nullcontext():
            result = work.compute(step.action, received)
        if step.sent is not None:
            assert result is not None
            self._exchange.send(step.sent, result)

    def _program(self, micro_batches: int, forward_only: bool) -> _Program:
        """The steps for so many micro-batches, compiled at their first use."""
        key = micro_batches, forward_only
        if key not in self._programs:
            schedule = self._plan(micro_batches)
            self._check(schedule)
            if (found := schedule.num_micro_batches) != micro_batches:
                raise ValueError(f"the plan for {micro_batches} micro-batches has {found}")
            if schedule.placement != self._placement:
                raise ValueError(
                    f"the plan for {micro_batches} micro-batches has its stages on the ranks "
                    f"{list(schedule.placement)}; they are on {list(self._placement)}"
                )
            if forward_only:
                schedule = schedule.forward_only()
            rank = self._state.pipeline.rank
            backward = [a for a in schedule.ranks[rank] if a.kind is Kind.BACKWARD]
            self._programs[key] = _Program(
                compile_steps(schedule, rank),
                last_backward={action.stage: action for action in backward},
                split=frozenset(filter(schedule.is_split, backward)),
            )
        return self._programs[key]

    def _check(self, schedule: Schedule) -> None:
        validate(schedule)
        pipeline = self._state.pipeline
        if schedule.num_ranks != pipeline.size:
            raise ValueError(
                f"the schedule is for {schedule.num_ranks} ranks, the pipeline has {pipeline.size}"
            )
        stages = schedule.stages_of(pipeline.rank)
        if len(self._chunks) != len(stages):
            raise ValueError(
                f"{len(self._chunks)} chunks given for the {len(stages)} stages of pipeline rank "
                f"{pipeline.rank}"
            )


class _Work:
    """The computing of one step: what each action does, and what passes between them."""

    def __init__(
        self,
        forward_step: ForwardStep,
        chunks: dict[int, Chunk],
        *,
        last_stage: int,
        batches: Sequence[Any],
        loss_scale: torch.Tensor | float | None,
        split: frozenset[Action],
    ) -> None:
        self._forward_step = forward_step
        self._chunks = chunks
        self._last_stage = last_stage
        self._batches = batches
        self._loss_scale = loss_scale
        self._split = split
        self._held: dict[Action, _Held] = {}
        self._deferred: dict[Action, DeferredGradients] = {}
        self.parts: dict[int, Parts] = {}

    def compute(self, action: Action, received: torch.Tensor | None) -> torch.Tensor | None:
        """Run an action on what it has received; returns what to send."""
        what = f" micro-batch {action.micro_batch} {action.kind.name.lower()}"
        with annotated("stage", action.stage, what):
            match action.kind:
                case Kind.FORWARD:
                    return self._forward(action, received)
                case Kind.BACKWARD:
                    return self._backward(action, received)
                case Kind.WEIGHT:
                    self._deferred.pop(action).compute()
                    return None

    def _forward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor | None:
        """Run a chunk on its input; returns the activation to send."""
        chunk = self._chunks[action.stage]
        if received is not None:
            chunk.set_input_tensor(received.requires_grad_(self._loss_scale is not None))
        batch = self._batches[action.micro_batch]
        output, parts = self._forward_step(chunk, batch, action.micro_batch)
        is_last = action.stage == self._last_stage
        if is_last:
            self.parts[action.micro_batch] = parts
        if self._loss_scale is not None:
            goal = output * self._loss_scale if is_last else output
            # Where all parameters are frozen and no input wants a gradient, there is no graph.
            place = get_gradient_edge(goal) if goal.requires_grad else None
            self._held[action._replace(kind=Kind.BACKWARD)] = _Held(received, place)
        return None if is_last else output.detach()

    def _backward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor | None:
        """Run autograd from the gradient of the output; returns the gradient of the input."""
        held = self._held.pop(action)
        if action in self._split:
            with defer_weight_gradients() as deferred:
                _run_autograd(held, received)
            self._deferred[action._replace(kind=Kind.WEIGHT)] = deferred
        else:
            _run_autograd(held, received)
        return None if held.input is None else held.input.grad


def _run_autograd(held: _Held, gradient: torch.Tensor | None) -> None:
    if held.output is not None:
        torch.autograd.backward(held.output, gradient)
