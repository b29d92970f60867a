"""One forward pass through all stages of a pipeline, and its results on every rank.

Each rank runs its stage: it receives the stream from the stage before, sends it to the next, and at
the end all that the stages have made is spread to all ranks of the pipeline. Every rank then holds
what one process would hold, and everything is differentiable: `loss.backward()`, called on every
rank, runs through the stages from the last to the first. A worked example, two stages::

    stage 0     embed, layers -> send ------------+        spread -> loss
    stage 1                      receive -> layers, head -> spread -> loss

    backward    stage 1: spread -> head, layers -> receive, which sends the stream's gradient
                stage 0: spread -> send, which receives it -> layers, embedding

Every rank computes the same with what was spread, so of each result the gradient that its owner has
is whole, and the others' are left aside. All of it goes through one node of the graph on each rank,
so that each backward pass uses every edge exactly once, whatever the loss depends on.

Gradients of what several ranks hold are summed when backward is over, see `SharedGradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from megatron.mpu import ParallelState, gather_from_tensor_region, scatter_to_tensor_region
from megatron.mpu.collectives import all_reduce, broadcast
from megatron.mpu.staging import staged
from megatron.mpu.watchdog import waiting

Shape = tuple[int, ...]
T = TypeVar("T")


class _Edge:
    """The neighbour of this stage on one side."""

    def __init__(self, state: ParallelState, step: int) -> None:
        axis = state.pipeline
        own, self.other = axis.ranks[axis.rank], axis.ranks[axis.rank + step]
        edge, back = (own, self.other), (self.other, own)
        out, into = (state.forward_edges, state.backward_edges)[:: 1 if step > 0 else -1]
        self._out, self._into = out[edge], into[back]

    def send(self, tensor: torch.Tensor) -> None:
        what = f"the stage of rank {self.other} to take what is sent"
        with waiting(what), staged(tensor.contiguous(), self._out, is_sent=True) as exchanged:
            dist.send(exchanged, self.other, group=self._out)

    def receive(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        what = f"what the stage of rank {self.other} sends"
        with waiting(what), staged(tensor, self._into) as exchanged:
            dist.recv(exchanged, self.other, group=self._into)
        return tensor


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        state: ParallelState,
        shape: Shape,
        dtype: torch.dtype,
        *shared: torch.Tensor,
    ) -> torch.Tensor:
        ctx.edge, ctx.nothing = _Edge(state, -1), (None,) * (4 + len(shared))
        return ctx.edge.receive(shape, dtype, state.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        ctx.edge.send(grad)
        return ctx.nothing


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        tensor: torch.Tensor,
        state: ParallelState,
        *shared: torch.Tensor,
    ) -> torch.Tensor:
        ctx.edge, ctx.nothing = _Edge(state, 1), (None,) * len(shared)
        ctx.like = tuple(tensor.shape), tensor.dtype, tensor.device
        ctx.edge.send(tensor)
        return tensor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, ctx.edge.receive(*ctx.like), None, *ctx.nothing


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sent: torch.Tensor,
        state: ParallelState,
        shapes: Sequence[Sequence[tuple[Shape, torch.dtype]]],
        at_end: Callable[[], None],
        *own: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        axis, results = state.pipeline, []
        ctx.at_end, ctx.no_gradient = at_end, sent.new_zeros(())
        ctx.first = sum(len(stage) for stage in shapes[: axis.rank])
        ctx.count = len(own)
        for stage, tensors in enumerate(shapes):
            for number, (shape, dtype) in enumerate(tensors):
                if stage == axis.rank:
                    tensor = own[number].contiguous()
                    tensor = tensor.view_as(tensor)
                else:
                    tensor = torch.empty(shape, dtype=dtype, device=state.device)
                results.append(broadcast(tensor, axis, stage))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # What runs when the whole backward pass is over may only be asked for from within it.
        torch.autograd.Variable._execution_engine.queue_callback(ctx.at_end)
        own = grads[ctx.first : ctx.first + ctx.count]
        return ctx.no_gradient, None, None, None, *own


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, state: ParallelState) -> torch.Tensor:
        ctx.axis = state.pipeline
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.axis), None


def _anchor() -> torch.Tensor:
    """A reason for autograd to come by, whatever of a stage is trained."""
    return torch.zeros((), requires_grad=True)


def receive_stream(
    state: ParallelState, shape: Shape, dtype: torch.dtype, shared: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """The stream [s, b, h] that the stage before has sent; its gradient is sent back.

    shared: what all stages are given; backward comes by there even if this stage makes no use of
        it, and only after the stream's gradient has been sent.
    """
    return _Receive.apply(_anchor(), state, shape, dtype, *shared)


def send_stream(
    stream: torch.Tensor, state: ParallelState, shared: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Send the stream to the next stage; `shared` as for `receive_stream`.

    Returns:
        what `spread` needs, so that backward comes by here and receives the stream's gradient.
    """
    return _Send.apply(_anchor(), stream, state, *shared)


def told_by_stages(said: T, state: ParallelState) -> list[T]:
    """What each stage has to say, a plain value, on every rank of the pipeline."""
    told: list[Any] = [None] * state.pipeline.size
    with waiting("the stages of the pipeline to say what they have made"):
        dist.all_gather_object(told, said, group=state.pipeline.group)
    return told


def spread(
    own: Sequence[torch.Tensor],
    kinds: Sequence[Sequence[tuple[Shape, torch.dtype]]],
    sent: torch.Tensor | None,
    state: ParallelState,
    at_end: Callable[[], None],
) -> list[list[torch.Tensor]]:
    """The tensors that each stage has made, on every rank of the pipeline.

    Args:
        own: those of this stage, of any number and shape.
        kinds: shape and type of each tensor of every stage.
        sent: what `send_stream` returned; None on the last stage.
        at_end: called when a backward pass through them is over.
    """
    handle = _anchor() if sent is None else sent
    flat = list(_Spread.apply(handle, state, kinds, at_end, *own))
    results = []
    for stage in kinds:
        results.append(flat[: len(stage)])
        flat = flat[len(stage) :]
    return results


def shared_input(tensor: torch.Tensor | None, state: ParallelState) -> torch.Tensor | None:
    """An input that every stage is given; its gradient is the sum of all stages'.

    The stages come together for that sum: it is to be among the `shared` of `receive_stream`, or on
    the first stage of `send_stream`, so that every backward pass reaches it.
    """
    if tensor is None or state.pipeline.size == 1 or not tensor.requires_grad:
        return tensor
    return _Shared.apply(tensor, state)


def all_heads(tensor: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """[b, n / t, ...] -> [b, n, ...]"""
    if state.tensor.size == 1:
        return tensor
    return gather_from_tensor_region(tensor.movedim(1, -1), state.tensor).movedim(-1, 1)


def own_heads(tensor: torch.Tensor, state: ParallelState) -> torch.Tensor:
    """[b, n, ...] -> [b, n / t, ...]"""
    if state.tensor.size == 1:
        return tensor
    return scatter_to_tensor_region(tensor.movedim(1, -1), state.tensor).movedim(-1, 1)


class SharedGradients:
    """Sums the gradients of parameters of which several ranks hold copies or terms.

    For whoever trains with any of PyTorch's optimizers: behind `backward` the gradients of both
    copies of tied word embeddings are the sum of the first and the last stage's, and gradients that
    are terms of a sum over the tensor ranks are that sum. Parameters with a `main_grad` are left to
    the optimizer that gave it to them.

    """

    def __init__(self, module: nn.Module, state: ParallelState) -> None:
        self._state = state
        self._tied: nn.Parameter | None = None
        self._pending: torch.Tensor | None = None
        for parameter in module.parameters():
            spec = parameter.shard_spec  # type: ignore[attr-defined]
            if spec.partial and state.tensor.size > 1:
                parameter.register_hook(self._summed(parameter))

    def tie(self, weight: nn.Parameter | None) -> None:
        """Have this stage's copy of the word embeddings get the gradients of both ends.

        weight: None on a stage between them.
        """
        if weight is not None and self._state.pipeline.size > 1:
            self._tied = weight
            weight.register_hook(self._withhold)

    def agree(self) -> None:
        """Have the copy be trained if, and only if, the first stage's own weight is.

        A user who freezes the embedding has one stage's in hand, and both ends wait for each other
        where only one of them has a gradient.
        """
        weight, axis = self._tied, self._state.embedding
        if weight is None or axis is None:
            return
        trained = torch.tensor(int(weight.requires_grad), device=self._state.device)
        weight.requires_grad_(bool(broadcast(trained, axis)))

    def finish(self) -> None:
        """Sum what has been withheld; every rank calls it when a backward pass is over."""
        weight, own = self._tied, self._pending
        self._pending = None
        if weight is None or not weight.requires_grad or hasattr(weight, "main_grad"):
            return
        assert self._state.embedding is not None
        total = all_reduce(torch.zeros_like(weight) if own is None else own, self._state.embedding)
        weight.grad = total if weight.grad is None else weight.grad.add_(total)

    def _withhold(self, gradient: torch.Tensor) -> torch.Tensor:
        """Keep this pass's gradient: the other stage joins in only when its own pass is over."""
        if hasattr(self._tied, "main_grad"):
            return gradient
        self._pending = gradient.clone(memory_format=torch.contiguous_format)
        return torch.zeros_like(gradient)

    def _summed(self, parameter: nn.Parameter) -> Callable[[torch.Tensor], torch.Tensor]:
        def over_tensor_ranks(gradient: torch.Tensor) -> torch.Tensor:
            if hasattr(parameter, "main_grad"):
                return gradient
            total = gradient.clone(memory_format=torch.contiguous_format)
            return all_reduce(total, self._state.tensor)

        return over_tensor_ranks
