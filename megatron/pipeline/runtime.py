"""Executes a pipeline schedule: exactly its table, one action after another.

A step of training on one rank:

1. The schedule has been compiled once into this rank's steps (`megatron.pipeline.messages`).
2. A forward action waits for its activation, runs the chunk and sends the output on. What stays for
   the backward pass is the input and the output's place in the autograd graph: the output itself
   is freed as soon as it has arrived at the next stage.
3. A backward action waits for the gradient of the output, runs autograd and sends the gradient of
   the input back. On the last stage it starts from the loss, times the loss scale.
4. Everything sent has arrived when the step returns.

The runtime knows nothing of models: it drives any module with `set_input_tensor` through the
`forward_step` that it is given. Gradients add up in the parameters over the micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

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


class PipelineRuntime:
    """This rank's part of a pipeline; every rank of the pipeline makes one, with the same schedule.

    Args:
        chunks: the stages that this rank holds, in the model's order.
        schedule: what to run; its ranks are the places along the pipeline axis.
        state: the process groups.
        forward_step: how a chunk is applied to a batch.
        activation: what travels between stages, in both directions.

    Raises:
        ValueError: the schedule is wrong or does not fit the pipeline or the chunks.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        schedule: Schedule,
        state: ParallelState,
        forward_step: ForwardStep,
        activation: TensorSpec,
    ) -> None:
        self._check(chunks, schedule, state)
        self.schedule = schedule
        self._chunks = chunks
        self._forward_step = forward_step
        rank = state.pipeline.rank
        self._stages = schedule.stages_of(rank)
        self._last_backward = {
            action.stage: action for action in schedule.ranks[rank] if action.kind is Kind.BACKWARD
        }
        self._training_steps = compile_steps(schedule, rank)
        self._evaluation_steps = compile_steps(schedule.forward_only(), rank)
        self._exchange = Exchange(state, activation)
        self._exchange.connect(edges(schedule))

    @staticmethod
    def _check(chunks: Sequence[Chunk], schedule: Schedule, state: ParallelState) -> None:
        validate(schedule)
        if schedule.num_ranks != state.pipeline.size:
            raise ValueError(
                f"the schedule is for {schedule.num_ranks} ranks, "
                f"the pipeline has {state.pipeline.size}"
            )
        stages = schedule.stages_of(state.pipeline.rank)
        if len(chunks) != len(stages):
            raise ValueError(
                f"{len(chunks)} chunks given for the {len(stages)} stages of pipeline rank "
                f"{state.pipeline.rank}"
            )
        if any(action.kind is Kind.WEIGHT for action in schedule.actions):
            raise ValueError(
                "the schedule has weight-gradient actions, which are not for this runtime"
            )

    def run(
        self,
        batches: Iterable[Any],
        *,
        forward_only: bool = False,
        on_last_backward: Callable[[int], None] | None = None,
        loss_scale: torch.Tensor | float = 1.0,
    ) -> list[Parts]:
        """Run one step over the schedule's micro-batches.

        Args:
            batches: one batch per micro-batch, in order; no more are taken from it than that.
            forward_only: evaluate: the forward actions alone, without gradients.
            on_last_backward: called with a chunk's index just before its last backward pass.
            loss_scale: what the loss is multiplied by before the backward pass.

        Returns:
            The loss parts of each micro-batch in order on the rank of the last stage, [] elsewhere.

        Raises:
            ValueError: the batches end too early, or an activation is not as announced.
            PipelineError: another rank died or did not answer within the groups' timeout.
        """
        work = _Work(
            self._forward_step,
            dict(zip(self._stages, self._chunks, strict=True)),
            last_stage=self.schedule.num_stages - 1,
            batches=_Batches(batches, uses=len(self._chunks)),
            loss_scale=None if forward_only else loss_scale,
        )
        with torch.set_grad_enabled(not forward_only):
            for step in self._evaluation_steps if forward_only else self._training_steps:
                action = step.action
                if on_last_backward and action == self._last_backward[action.stage]:
                    on_last_backward(self._stages.index(action.stage))
                self._take(step, work)
        self._exchange.flush()
        return [work.parts[i] for i in sorted(work.parts)]

    def _take(self, step: Step, work: _Work) -> None:
        for message in step.post:
            self._exchange.post(message)
        received = self._exchange.receive(step.received) if step.received else None
        for message in step.delivered:
            self._exchange.release(message)
        compute = work.forward if step.action.kind is Kind.FORWARD else work.backward
        result = compute(step.action, received)
        if step.sent is not None:
            assert result is not None
            self._exchange.send(step.sent, result)


class _Work:
    """The computing of one step: what each action does, and what passes between them."""

    def __init__(
        self,
        forward_step: ForwardStep,
        chunks: dict[int, Chunk],
        *,
        last_stage: int,
        batches: _Batches,
        loss_scale: torch.Tensor | float | None,
    ) -> None:
        self._forward_step = forward_step
        self._chunks = chunks
        self._last_stage = last_stage
        self._batches = batches
        self._loss_scale = loss_scale
        self._held: dict[Action, _Held] = {}
        self.parts: dict[int, Parts] = {}

    def forward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor | None:
        """Run a chunk on its input; returns the activation to send."""
        chunk = self._chunks[action.stage]
        if received is not None:
            chunk.set_input_tensor(received.requires_grad_(self._loss_scale is not None))
        batch = self._batches.take(action.micro_batch)
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

    def backward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor | None:
        """Run autograd from the gradient of the output; returns the gradient of the input."""
        held = self._held.pop(action)
        if held.output is not None:
            torch.autograd.backward(held.output, received)
        return None if held.input is None else held.input.grad


class _Batches:
    """Hands out batches by micro-batch and keeps each until every chunk has used it."""

    def __init__(self, batches: Iterable[Any], uses: int) -> None:
        self._source = iter(batches)
        self._uses = uses
        self._taken = 0
        self._kept: dict[int, tuple[Any, int]] = {}

    def take(self, micro_batch: int) -> Any:
        """The batch of `micro_batch`; raises ValueError where there are too few."""
        while self._taken <= micro_batch:
            try:
                self._kept[self._taken] = next(self._source), self._uses
            except StopIteration:
                raise ValueError(
                    f"the schedule wants micro-batch {micro_batch}, "
                    f"but there are only {self._taken} batches"
                ) from None
            self._taken += 1
        batch, uses = self._kept.pop(micro_batch)
        if uses > 1:
            self._kept[micro_batch] = batch, uses - 1
        return batch
