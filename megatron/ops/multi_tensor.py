"""Operations on all elements of many tensors, in one launch (`csrc/cuda/multi_tensor.cu`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.ops import kernels
from megatron.ops.operator import operator


def host_table(*parts: Sequence[Tensor]) -> Tensor:
    """What `csrc/cuda/tiles.cuh` reads: i64[rows, parts + 1] on the host.

    Row i has the addresses of the i-th tensor of every part, and how many elements each of them
    has, or at least the first. It lives as long as the caller holds it, which is until the launch.
    """
    rows = list(zip(*parts, strict=True))
    assert all(tensor.is_contiguous() for row in rows for tensor in row)
    entries = [[*(tensor.data_ptr() for tensor in row), row[0].numel()] for row in rows]
    return torch.tensor(entries, dtype=torch.int64, device="cpu")


def _squares_kernel(first: Tensor, others: Sequence[Tensor]) -> Tensor:
    tensors = [tensor.contiguous() for tensor in (first, *others)]
    assert all(tensor.dtype == first.dtype for tensor in tensors)
    count = len(tensors)
    total = first.new_empty((), dtype=torch.float64)
    parts = total.new_empty(kernels.number("multi_tensor_parts", count))
    table = host_table(tensors)
    kernels.launch("multi_tensor_squares", total, parts, table, count, first.dtype)
    return total


def _squares_twin(first: Tensor, others: Sequence[Tensor]) -> Tensor:
    total = first.double().square().sum()
    for tensor in others:
        total = total + tensor.double().square().sum()
    return total


def _divide_kernel(tensors: Sequence[Tensor], divisor: Tensor) -> None:
    assert all(tensor.dtype == tensors[0].dtype for tensor in tensors)
    if tensors:
        table = host_table(tensors)
        kernels.launch("multi_tensor_divide", divisor, table, len(tensors), tensors[0].dtype)


def _divide_twin(tensors: Sequence[Tensor], divisor: Tensor) -> None:
    for tensor in tensors:
        tensor.div_(divisor)


def _add_at_kernel(flat: Tensor, starts: Sequence[int], terms: Sequence[Tensor]) -> None:
    assert flat.dtype == torch.float32 and flat.is_contiguous()
    assert all(term.dtype == terms[0].dtype for term in terms)
    if terms:
        first = torch.tensor(starts, dtype=torch.int64, device="cpu")
        table = host_table(terms)
        kernels.launch("multi_tensor_add", flat, first, table, len(terms), terms[0].dtype)


def _add_at_twin(flat: Tensor, starts: Sequence[int], terms: Sequence[Tensor]) -> None:
    for start, term in zip(starts, terms, strict=True):
        flat[start : start + term.numel()].add_(term.flatten())


_squares = operator(
    # The first stands by itself to say which implementation runs.
    "sum_of_squares(Tensor first, Tensor[] others) -> Tensor",
    kernel=_squares_kernel,
    twin=_squares_twin,
)
_divide = operator(
    "divide_(Tensor(a!)[] tensors, Tensor divisor) -> ()",
    kernel=_divide_kernel,
    twin=_divide_twin,
)
_add_at = operator(
    "add_at_(Tensor(a!) flat, int[] starts, Tensor[] terms) -> ()",
    kernel=_add_at_kernel,
    twin=_add_at_twin,
)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of all elements of all `tensors`, a float64 scalar; not finite where an element is not.

    There must be a tensor, and all must have one dtype and be on one device.
    """
    return _squares(tensors[0], tensors[1:])


def divide_(tensors: Sequence[Tensor], divisor: Tensor) -> None:
    """Divide all elements of all `tensors` in place by a scalar that is on their device.

    The tensors are contiguous and of one dtype. A float32 divisor goes to the kernel, where there
    is one for the tensors, a float64 divisor to PyTorch.
    """
    _divide(tensors, divisor)


def add_at_(flat: Tensor, starts: Sequence[int], terms: Sequence[Tensor]) -> None:
    """Add each of `terms` in place to as many elements of `flat` [n], from that at its start on.

    The terms are contiguous, of one dtype and on the device of `flat`, and no two of them meet. A
    float32 `flat` goes to the kernel, where there is one.
    """
    _add_at(flat, starts, terms)
