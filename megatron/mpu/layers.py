"""The layers that are split over the tensor axis (arXiv 1909.08053, section 3).

A column-parallel product followed by a row-parallel one needs a single all-reduce in each
direction: the first leaves every rank with some of the columns, which is just the part of the
rows that the second wants::

    Y = f(X A) B,   A = [A_0 | A_1],   B = [B_0 ; B_1],   Y = sum_r f(X A_r) B_r

With sequence parallelism (arXiv 2205.05198) each rank holds s/t positions between such blocks: the
column-parallel product begins with an all-gather and the row-parallel one ends with a
reduce-scatter. The gathered input is not held for the backward pass but gathered once more, beside
the product that makes the input's gradient.

Gradients of the weights are added straight into ``weight.main_grad`` where the optimizer has laid
a flat buffer under it, so that no temporary gradient exists and no second pass adds it up. A split
backward pass leaves them for later (`megatron.mpu.deferral`).

Letters: s sequence, b micro-batch, h hidden, n any leading dims flattened, t tensor size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron.mpu.collectives import (
    all_gather,
    gather_from_tensor_region,
    reduce_from_tensor_region,
    reduce_scatter_to_sequence_region,
    scatter_to_tensor_region,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron.mpu.deferral import current_deferral
from megatron.mpu.fp8 import Fp8Products, Fp8Recipe
from megatron.mpu.init import InitMethod, create_parameter, zeros
from megatron.mpu.parallel_state import Axis, ParallelState
from megatron.mpu.products import PLAIN, Products, flatten
from megatron.mpu.shard_spec import ShardSpec
from megatron.ops.embedding import add_rows


def _new(
    spec: ShardSpec, state: ParallelState, init_method: InitMethod, dtype: torch.dtype
) -> nn.Parameter:
    return create_parameter(spec, state.tensor, init_method, dtype=dtype, device=state.device)


def _weight_gradient(
    products: Products,
    weight: torch.Tensor,
    factor: Any,
    held: Sequence[torch.Tensor],
    gathered: torch.Tensor | None,
) -> torch.Tensor | None:
    """grad_output^T input [out, in]: added into ``main_grad`` where there is one, else returned."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return products.weight_gradient(factor, held, gathered)
    products.add_weight_gradient(main_grad, factor, held, gathered)
    return None


def _leave_weight_gradient(
    products: Products,
    weight: nn.Parameter,
    factor: Any,
    held: Sequence[torch.Tensor],
    gather_axis: Axis | None,
) -> bool:
    """Defer the weight's gradient where the backward pass is split; whether it was."""
    deferred = current_deferral()
    if deferred is None:
        return False
    # Without their places in the graph, which would keep what the stage has received and sent back.
    kept = [each.detach() for each in held]

    def product() -> None:
        gathered = None if gather_axis is None else all_gather(kept[0], gather_axis)
        gradient = _weight_gradient(products, weight, factor, kept, gathered)
        if gradient is not None:
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

    deferred.add(weight, product)
    return True


class _Linear(torch.autograd.Function):
    """x W^T + b whose input gradient is reduced over an axis while the weight's is computed.

    With ``split_sequence`` x is this rank's part of the sequence: gathered over the axis first, and
    its gradient reduced and scattered, in place of reduced.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        grad_axis: Axis | None,
        split_sequence: bool,
        products: Products,
        differentiated: bool,
    ) -> torch.Tensor:
        ctx.grad_axis, ctx.split_sequence, ctx.products = grad_axis, split_sequence, products
        gather_axis = grad_axis if split_sequence else None
        y, held = products.forward(x, weight, bias, gather_axis, differentiated=differentiated)
        ctx.save_for_backward(weight, *held)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        weight, *held = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        products, gather_axis = ctx.products, ctx.grad_axis if ctx.split_sequence else None
        grads = flatten(grad_output)
        grad_weight = gathered = finish = None
        for_input, for_weight = products.factors(
            grads, need_input=need_input, need_weight=need_weight
        )
        deferred = need_weight and _leave_weight_gradient(
            products, weight, for_weight, held, gather_axis
        )
        if need_weight and not deferred and gather_axis is not None:
            gathered = start_all_gather(held[0], gather_axis)
        if need_input:
            grad_input = products.input_gradient(for_input, weight, held)
            finish = _start_input_gradient(ctx, grad_input, grad_output)
        if need_weight and not deferred:
            whole = None if gathered is None else gathered.wait()
            grad_weight = _weight_gradient(products, weight, for_weight, held, whole)
        grad_bias = grads.sum(dim=0) if need_bias else None
        grad_input = None if finish is None else finish()
        return grad_input, grad_weight, grad_bias, None, None, None, None


def _start_input_gradient(
    ctx: Any, grad_input: torch.Tensor, grad_output: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Begin to reduce the input's gradient; what is returned waits for it."""
    grad_input = grad_input.view(*grad_output.shape[:-1], -1)
    if ctx.grad_axis is None:
        return lambda: grad_input
    if ctx.split_sequence:
        return start_reduce_scatter(grad_input, ctx.grad_axis).wait
    return start_all_reduce(grad_input, ctx.grad_axis).wait


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grad_axis: Axis | None = None,
    *,
    split_sequence: bool = False,
    products: Products = PLAIN,
) -> torch.Tensor:
    """x W^T + b: [..., in], [out, in], [out] -> [..., out].

    With ``grad_axis`` the input's gradient is summed over that axis, as where a block that is
    split over it begins. With ``split_sequence`` as well, x is [s / t, ..., in], this rank's part
    of a sequence split over that axis, and the result [s, ..., out].
    """
    split_sequence = split_sequence and grad_axis is not None and grad_axis.size > 1
    differentiated = torch.is_grad_enabled()
    return _Linear.apply(x, weight, bias, grad_axis, split_sequence, products, differentiated)


class _EmbeddingLookup(torch.autograd.Function):
    """Rows of ``weight``; the gradient touches only the rows that were looked up."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids, weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[None, torch.Tensor | None]:
        ids, weight = ctx.saved_tensors
        main_grad = getattr(weight, "main_grad", None)
        if main_grad is None:
            dense = torch.ops.aten.embedding_dense_backward(
                grad_output, ids, weight.size(0), -1, False
            )
            return None, dense
        add_rows(main_grad, ids.flatten(), flatten(grad_output))
        return None, None


def embedding_lookup(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of ``weight`` [v, h] at ``ids`` i64[...] -> [..., h]."""
    return _EmbeddingLookup.apply(ids, weight)


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows are split over the tensor axis.

    Each rank looks up the tokens whose rows it holds, leaves zeros for the others, and the sum
    over the axis is the embedding.

    Args:
        num_embeddings: true number of rows.
        embedding_dim: h.
        padded: number of rows with padding, divisible by the tensor size.
        tied_to: name of the embedding on another stage that this one is a copy of.
        sequence_parallel: whether each rank gets its part of the sequence, the ids' first dim.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        name: str,
        state: ParallelState,
        init_method: InitMethod,
        dtype: torch.dtype,
        padded: int | None = None,
        tied_to: str | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.axis = state.tensor
        self.sequence_parallel = sequence_parallel
        spec = ShardSpec(
            f"{name}.weight",
            (num_embeddings, embedding_dim),
            dim=0,
            padded=padded,
            tied_to=tied_to,
        )
        self.weight = _new(spec, state, init_method, dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """i64[s, ...] -> [s, ..., h], or [s / t, ..., h] with sequence parallelism"""
        if self.axis.size == 1:
            return embedding_lookup(ids, self.weight)
        rows = self.weight.size(0)
        local = ids - self.axis.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        output = embedding_lookup(local.masked_fill(elsewhere, 0), self.weight)
        output = output.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_region(output, self.axis)
        return reduce_from_tensor_region(output, self.axis)


class ColumnParallelLinear(nn.Module):
    """y = x A^T + b with the rows of A, the columns of y, split over the tensor axis.

    Args:
        blocks: sizes of the blocks of the output that are split one by one (see ShardSpec).
        gather_output: whether every rank gets all of y, or the part that it computed.
        sequence_parallel: whether x is this rank's part of the sequence, its first dim.
        fp8: how the products are computed in 8 bits; None where they are not.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        name: str,
        state: ParallelState,
        init_method: InitMethod,
        dtype: torch.dtype,
        bias: bool = True,
        blocks: tuple[int, ...] = (),
        gather_output: bool = False,
        sequence_parallel: bool = False,
        fp8: Fp8Recipe | None = None,
    ) -> None:
        super().__init__()
        self.axis = state.tensor
        self.gather_output = gather_output
        self.sequence_parallel = sequence_parallel
        weight = ShardSpec(f"{name}.weight", (output_size, input_size), dim=0, blocks=blocks)
        self.weight = _new(weight, state, init_method, dtype)
        self.products = PLAIN if fp8 is None else Fp8Products(fp8, self.weight)
        self.bias = None
        if bias:
            spec = ShardSpec(f"{name}.bias", (output_size,), dim=0, blocks=blocks)
            self.bias = _new(spec, state, zeros, dtype)

    def forward(self, x: torch.Tensor, *, add_bias: bool = True) -> torch.Tensor:
        """[..., in] -> [..., out / t], or [..., out] gathered.

        Without ``add_bias`` the bias is left to the caller, who fuses it with what follows.
        """
        y = linear(
            x,
            self.weight,
            self.bias if add_bias else None,
            grad_axis=self.axis,
            split_sequence=self.sequence_parallel,
            products=self.products,
        )
        return gather_from_tensor_region(y, self.axis) if self.gather_output else y


class RowParallelLinear(nn.Module):
    """y = x A^T + b with the columns of A, and with them x, split over the tensor axis.

    Args:
        input_is_parallel: whether x already is this rank's part.
        sequence_parallel: whether each rank gets its part of the sequence, the first dim of y.
        fp8: how the products are computed in 8 bits; None where they are not.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        name: str,
        state: ParallelState,
        init_method: InitMethod,
        dtype: torch.dtype,
        bias: bool = True,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        fp8: Fp8Recipe | None = None,
    ) -> None:
        super().__init__()
        self.axis = state.tensor
        self.input_is_parallel = input_is_parallel
        self.sequence_parallel = sequence_parallel
        weight = ShardSpec(f"{name}.weight", (output_size, input_size), dim=1)
        self.weight = _new(weight, state, init_method, dtype)
        self.products = PLAIN if fp8 is None else Fp8Products(fp8, self.weight)
        self.bias = None
        if bias:
            # Whole on every rank: it is added once, after the sum.
            partial = sequence_parallel and state.tensor.size > 1
            spec = ShardSpec(f"{name}.bias", (output_size,), partial=partial)
            self.bias = _new(spec, state, zeros, dtype)

    def forward(self, x: torch.Tensor, *, add_bias: bool = True) -> torch.Tensor:
        """[s, ..., in / t], or [s, ..., in] where x is whole -> [s or s / t, ..., out].

        Without ``add_bias`` the bias is left to the caller, who fuses it with what follows.
        """
        if not self.input_is_parallel:
            x = scatter_to_tensor_region(x, self.axis)
        bias = self.bias if add_bias else None
        if self.axis.size == 1:
            return linear(x, self.weight, bias, products=self.products)
        y = linear(x, self.weight, None, products=self.products)
        if self.sequence_parallel:
            y = reduce_scatter_to_sequence_region(y, self.axis)
        else:
            y = reduce_from_tensor_region(y, self.axis)
        return y if bias is None else y + bias


def parallel_lm_logits(
    x: torch.Tensor,
    word_embeddings_weight: torch.Tensor,
    axis: Axis,
    bias: torch.Tensor | None,
    *,
    sequence_parallel: bool = False,
) -> torch.Tensor:
    """Logits of this rank's part of the vocabulary from the (tied) word embeddings.

    Args:
        x: [..., h], the same on all tensor ranks; with ``sequence_parallel`` [s / t, ..., h].
        word_embeddings_weight: [v / t, h]; bias: [v / t].

    Returns:
        [..., v / t]; with ``sequence_parallel`` of the whole sequence, [s, ..., v / t].
    """
    return linear(x, word_embeddings_weight, bias, grad_axis=axis, split_sequence=sequence_parallel)
