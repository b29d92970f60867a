"""What a linear layer multiplies, and what it holds of its input to differentiate that.

`Products` is how `megatron.mpu.layers` sees it: y = x W^T + b, then from the gradient g of y the
gradients g W of x and g^T x of W. `PlainProducts` computes them as they stand;
`megatron.mpu.fp8` has others.

Letters: n all dims but the last, flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from megatron.mpu.collectives import all_gather
from megatron.mpu.parallel_state import Axis
from megatron.ops.matmul import add_product, linear_product, product


def flatten(tensor: torch.Tensor) -> torch.Tensor:
    """[..., k] -> [n, k]"""
    return tensor.reshape(-1, tensor.size(-1))


class Products(Protocol):
    """The three products of a linear layer; all are called where autograd records nothing."""

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gather_axis: Axis | None,
        *,
        differentiated: bool,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """x W^T + b [..., out] of x [..., in], and what is to be held for the backward pass.

        With ``gather_axis`` x is this rank's part of the first dim, and so is the first of the
        tensors to be held: it comes back gathered. Nothing is ``differentiated`` without a graph.
        """

    def factors(
        self, grads: torch.Tensor, *, need_input: bool, need_weight: bool
    ) -> tuple[Any, Any]:
        """What the two products of the backward pass take of g [n, out], where they are needed."""

    def input_gradient(
        self, factor: Any, weight: torch.Tensor, held: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """g W [n, in]"""

    def weight_gradient(
        self, factor: Any, held: Sequence[torch.Tensor], gathered: torch.Tensor | None
    ) -> torch.Tensor:
        """g^T x [out, in]; ``gathered`` stands for the first that is held, where it was split."""

    def add_weight_gradient(
        self,
        total: torch.Tensor,
        factor: Any,
        held: Sequence[torch.Tensor],
        gathered: torch.Tensor | None,
    ) -> None:
        """total += g^T x, in place."""


class PlainProducts:
    """Products of the tensors as they are."""

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gather_axis: Axis | None,
        *,
        differentiated: bool,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        total = x if gather_axis is None else all_gather(x, gather_axis)
        return linear_product(total, weight, bias), (x,)

    def factors(
        self, grads: torch.Tensor, *, need_input: bool, need_weight: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return grads, grads

    def input_gradient(
        self, factor: torch.Tensor, weight: torch.Tensor, held: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        return product(factor, weight)

    def weight_gradient(
        self, factor: torch.Tensor, held: Sequence[torch.Tensor], gathered: torch.Tensor | None
    ) -> torch.Tensor:
        return product(factor.t(), flatten(held[0] if gathered is None else gathered))

    def add_weight_gradient(
        self,
        total: torch.Tensor,
        factor: torch.Tensor,
        held: Sequence[torch.Tensor],
        gathered: torch.Tensor | None,
    ) -> None:
        add_product(total, factor.t(), flatten(held[0] if gathered is None else gathered))


PLAIN = PlainProducts()
