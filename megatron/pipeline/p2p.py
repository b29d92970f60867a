"""Point-to-point communication between the ranks of a pipeline, which cannot deadlock.

Three rules keep ranks from waiting for one another:

1. Every directed edge has a communicator for activations and one for gradients, so a message never
   queues behind one that its receiver wants later.
2. Sends are asynchronous. The sent tensor is held until the schedule proves that it has arrived, or
   that waiting for it cannot stop the pipeline (`megatron.pipeline.messages`). What is still on its
   way when a step ends is left so; the next step waits for it when it uses the same edge.
3. Receives are opened ahead, so that data travels while the rank computes.

Where a rank opens a receive and starts a send at the same point, they are not batched into one NCCL
call: a batch is one kernel, which ends when the slowest of its messages has. On communicators of
their own, each on a stream of its own, they run at the same time and end one by one.

With NCCL `wait` makes the device's stream wait, not the host. Over gloo an accelerator's tensors
pass through the host's memory (`megatron.mpu.staging`). Buffers for receives come from
torch's allocator each time: it hands out a freed buffer again exactly when nothing refers to it any
longer, which only it can know, since autograd may keep views of an activation or a gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.staging import goes_through_host, on_host, room_on_host, staged
from megatron.mpu.watchdog import waiting
from megatron.pipeline.actions import Kind
from megatron.pipeline.messages import Edge, Message


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of the activation that a stage sends on, and of its gradient."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class PipelineError(RuntimeError):
    """A message did not arrive: the other rank died, or the group's timeout passed."""


class _Sent(NamedTuple):
    """A message on its way, with the tensor that must live until it has arrived."""

    message: Message
    work: dist.Work
    tensor: torch.Tensor


class Exchange:
    """Sends and receives of one rank; messages are given in the order of the compiled schedule.

    Args:
        state: the process groups.
        activation: what a stage sends to the next one; its gradient comes back in the same shape.
    """

    def __init__(self, state: ParallelState, activation: Callable[[int], TensorSpec]) -> None:
        self._state = state
        self._activation = activation
        self._incoming: dict[Message, tuple[dist.Work, torch.Tensor]] = {}
        self._outgoing: dict[Message, _Sent] = {}
        self._of_last_step: dict[Edge, list[_Sent]] = defaultdict(list)
        self._local: dict[Message, torch.Tensor] = {}

    def connect(self, edges: Sequence[Edge]) -> None:
        """Make the connections; all ranks of the pipeline must give the same edges in one order.

        A communicator is otherwise made by its first message, and NCCL holds up the host until the
        other side joins: two ranks that begin with different edges would then wait for each other.

        Raises:
            ValueError: the parallel state has no communicator for an edge.
            PipelineError: a neighbour is gone, or did not come within the group's timeout.
        """
        token = torch.zeros(1, device=self._state.device)
        here = self._state.pipeline.rank
        for edge in edges:
            if here not in (edge.source, edge.target):
                continue
            peer = self._global_rank(edge.target if here == edge.source else edge.source)
            exchange = dist.send if here == edge.source else dist.recv
            group = self._group(edge)
            words = f"rank {self._state.rank} waits to connect to rank {peer}"
            try:
                with waiting(words), staged(token, group) as exchanged:
                    exchange(exchanged, peer, group=group)
            except RuntimeError as error:
                raise PipelineError(f"{words}: {_cause(error)}") from error

    def post(self, message: Message) -> None:
        """Open the receive of `message`."""
        edge, spec = message.edge, self._spec(message)
        group = self._group(edge)
        buffer = torch.empty(spec.shape, dtype=spec.dtype, device=self._state.device)
        if goes_through_host(buffer, group):
            buffer = room_on_host(buffer)
        try:
            work = dist.irecv(buffer, self._global_rank(edge.source), group=group)
        except RuntimeError as error:
            raise self._failure(message, error) from error
        assert work is not None
        self._incoming[message] = work, buffer

    def receive(self, message: Message) -> torch.Tensor:
        """Wait for `message`, which must have been posted unless it is local.

        Raises:
            PipelineError: says in words which rank waited for what, and why it ended.
        """
        if message.is_local:
            return self._local.pop(message)
        work, buffer = self._incoming.pop(message)
        self._wait(message, work)
        return buffer.to(self._state.device)

    def send(self, message: Message, tensor: torch.Tensor) -> None:
        """Start sending `tensor`, which must not be changed afterwards.

        Raises:
            ValueError: it is not what the receiver expects.
            PipelineError: the receiver is gone.
        """
        if message.is_local:
            self._local[message] = tensor
            return
        found, spec = TensorSpec(tuple(tensor.shape), tensor.dtype), self._spec(message)
        if found != spec:
            raise ValueError(
                f"stage {message.producer.stage} made {message} as {found.dtype} "
                f"{list(found.shape)}; the pipeline carries {spec.dtype} {list(spec.shape)}"
            )
        edge = message.edge
        group = self._group(edge)
        tensor = on_host(tensor) if goes_through_host(tensor, group) else tensor.contiguous()
        self._settle(edge)
        try:
            work = dist.isend(tensor, self._global_rank(edge.target), group=group)
        except RuntimeError as error:
            raise self._failure(message, error) from error
        assert work is not None
        self._outgoing[message] = _Sent(message, work, tensor)

    def release(self, message: Message) -> None:
        """Let go of the sent tensor of `message`, once it has arrived.

        Raises:
            PipelineError: it does not, since the receiver is gone.
        """
        if not message.is_local:
            self._wait(message, self._outgoing.pop(message).work)

    def end_step(self) -> None:
        """Leave what has been sent and not been released to itself; everything was received."""
        assert not self._incoming
        assert not self._local
        for sent in self._outgoing.values():
            self._of_last_step[sent.message.edge].append(sent)
        self._outgoing.clear()

    def flush(self) -> None:
        """Wait until everything sent in earlier steps has arrived.

        Raises:
            PipelineError: a receiver is gone.
        """
        for edge in tuple(self._of_last_step):
            self._settle(edge)

    def _settle(self, edge: Edge) -> None:
        """Wait for the last step's messages: their receivers end that step without this one."""
        for sent in self._of_last_step.pop(edge, ()):
            self._wait(sent.message, sent.work)

    def _spec(self, message: Message) -> TensorSpec:
        return self._activation(min(message.producer.stage, message.consumer.stage))

    def _wait(self, message: Message, work: dist.Work) -> None:
        try:
            with waiting(lambda: self._words(message)):
                work.wait()
        except RuntimeError as error:
            raise self._failure(message, error) from error

    def _words(self, message: Message) -> str:
        """What this rank waits for when it waits for `message`."""
        edge = message.edge
        if self._state.pipeline.rank == edge.target:
            stage, wait = message.consumer.stage, f"receive {message} from"
            peer = self._global_rank(edge.source)
        else:
            stage, wait = message.producer.stage, f"send {message} to"
            peer = self._global_rank(edge.target)
        return f"rank {self._state.rank}, stage {stage}, waits to {wait} rank {peer}"

    def _failure(self, message: Message, error: RuntimeError) -> PipelineError:
        return PipelineError(f"{self._words(message)}: {_cause(error)}")

    def _global_rank(self, place: int) -> int:
        return self._state.pipeline.ranks[place]

    def _group(self, edge: Edge) -> dist.ProcessGroup:
        forward = edge.kind is Kind.FORWARD
        groups = self._state.forward_edges if forward else self._state.backward_edges
        pair = self._global_rank(edge.source), self._global_rank(edge.target)
        if pair not in groups:
            what = "activations" if forward else "gradients"
            raise ValueError(
                f"the schedule sends {what} from rank {pair[0]} to rank {pair[1]}, "
                "for which the parallel state has no communicator"
            )
        return groups[pair]


def _cause(error: RuntimeError) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
