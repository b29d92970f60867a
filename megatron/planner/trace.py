"""What one action of a step does on one rank, as the planner has seen it happen.

A trace is the list of a rank's operators and communications in the order in which the host issued
them. Operators run one after another. A communication begins where it stands and runs beside what
follows; a `Wait` says where the operators behind it need its result. A collective that nothing
overlaps is a communication with its wait right behind it.

This file imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator on the device.

    Attributes:
        name: PyTorch's name of the operator, such as "aten.mm".
        kind: "matmul" for products of matrices, "attention" for fused attention, "memory" for what
            is bound by reading and writing.
        flops: floating-point operations of a product or an attention, 0 of the others. Causal
            attention counts in full, as if every position saw every other.
        bytes: read and written, each tensor once.
        shape: (batch, m, n, k) of a product [m, k] x [k, n]; (batch and heads, queries, keys, head
            size) of an attention.
        dtype: number format, such as "bfloat16".
        causal: whether it is an attention that computes about half of `flops`.
    """

    name: str
    kind: str
    flops: float
    bytes: int
    shape: tuple[int, ...] = ()
    dtype: str = ""
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Communication:
    """One collective or message of a rank, begun here.

    Attributes:
        kind: all-reduce, all-gather, reduce-scatter, broadcast, send or recv.
        group: the axis it runs over: tensor, pipeline, data, model, embedding, position-embedding
            or world.
        ranks: global ranks of the group, ascending.
        bytes: of the whole tensor: what an all-reduce and a reduce-scatter are given, what an
            all-gather results in, the message.
        number: counts the communications of a rank, for `Wait`.
    """

    kind: str
    group: str
    ranks: tuple[int, ...]
    bytes: int
    number: int


@dataclass(frozen=True, slots=True)
class Wait:
    """What follows needs the result of the communication of this number."""

    number: int


Event = Operation | Communication | Wait
Trace = tuple[Event, ...]
