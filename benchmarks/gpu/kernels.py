"""Every operator that has a kernel: what it is measured on, and what it is measured beside.

The bytes of a case are those that nobody can do without: each input read once, each result written
once. What else an implementation reads or writes counts against it.

Letters: n tokens, h hidden, f width of the MLP, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops import philox
from megatron.ops.adamw import adamw_
from megatron.ops.cross_entropy import logits_gradient, row_losses
from megatron.ops.dropout import bias_dropout_add
from megatron.ops.fp8 import Factor, fp8_cast, fp8_scale, fp8_transpose
from megatron.ops.fused_norm import norm_after_add
from megatron.ops.mlp import bias_activation
from megatron.ops.multi_tensor import add_at_, divide_, sum_of_squares
from megatron.ops.norm import layer_norm, rms_norm
from megatron.ops.rotary import Rotation, rotate, rotation, split_heads
from megatron.ops.softmax import scaled_softmax

Inputs = tuple[Any, ...]
Function = Callable[..., Any]

E4M3 = torch.float8_e4m3fn
LEARNING_RATE, BETAS, ADAM_EPSILON, DECAY = 1e-4, (0.9, 0.999), 1e-8, 0.01
EPSILON = 1e-5
DROPPED = 0.1
SCALE = 0.125


@dataclass
class Draw:
    """Draws inputs.

    Attributes:
        tiny: None for full size; 0 for a tiny size that fits into whole accesses, 1 for one that
            does not.
    """

    device: str
    tiny: int | None = None
    dtype: torch.dtype = torch.bfloat16

    def pick(self, full: int, *tiny: int) -> int:
        """A size."""
        return full if self.tiny is None else tiny[min(self.tiny, len(tiny) - 1)]

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Of mean 0 and deviation 1."""
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    def positive(self, *shape: int) -> Tensor:
        """From 0 to 1, float32."""
        return torch.rand(shape, device=self.device)

    def below(self, limit: int, *shape: int) -> Tensor:
        """Whole numbers, i64."""
        return torch.randint(limit, shape, device=self.device)


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operator at one shape.

    Attributes:
        draw: makes a set of inputs.
        ours: the operator that has a kernel, called with the inputs.
        formula: the same in plain PyTorch, which `torch.compile` gets.
        torch: PyTorch's own operators for it, the formula where None.
        moved: the necessary bytes of the forward pass, from the inputs.
        moved_back: those of the backward pass, which is measured where this is given; it goes
            through autograd to all inputs of floating point.
        comparable: whether results of a call are to be compared: not those of random dropping, nor
            what works in place.
    """

    name: str
    draw: Callable[[Draw], Inputs]
    ours: Function
    formula: Function
    moved: Callable[..., int]
    torch: Function | None = None
    moved_back: Callable[..., int] | None = None
    comparable: bool = True


def size(*tensors: Tensor) -> int:
    """Bytes of all of them."""
    return sum(x.numel() * x.element_size() for x in tensors)


def _bias_activation(draw: Draw, width: int = 1) -> Inputs:
    f = width * draw.pick(8192, 136, 67)
    return draw.normal(draw.pick(16384, 70), f), draw.normal(f)


def _gated(x: Tensor, bias: Tensor) -> Tensor:
    gate, linear = (x + bias).chunk(2, dim=-1)
    return F.silu(gate) * linear


def _bias_gelu(x: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    return F.gelu(x + bias, approximate=approximate)


def _mlp_cases() -> Iterable[Case]:
    for kind, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        yield Case(
            name=f"bias, {kind}",
            draw=_bias_activation,
            ours=partial(bias_activation, kind=kind, gated=False),
            formula=partial(_bias_gelu, approximate=approximate),
            moved=lambda x, bias: size(x, bias, x),
            moved_back=lambda x, bias: size(x, x, x, bias, bias),
        )
    yield Case(
        name="bias, swiglu",
        draw=lambda draw: _bias_activation(draw, width=2),
        ours=lambda x, bias: bias_activation(x, bias, "silu", gated=True),
        formula=_gated,
        moved=lambda x, bias: size(x, bias) + size(x) // 2,
        moved_back=lambda x, bias: size(x, x, bias, bias) + size(x) // 2,
    )


def _rows(draw: Draw, h: int) -> Inputs:
    """A stream [n, h] of as many bytes at every h, and a weight and a bias."""
    width = draw.pick(h, h, h + 1)
    n = draw.pick(2**27 // h, max(3, 2**14 // h))
    return draw.normal(n, width), draw.normal(width), draw.normal(width)


def _norm_cases() -> Iterable[Case]:
    # One warp holds a row, a block does, and none does.
    for h in (1024, 4096, 32768):
        yield Case(
            name=f"LayerNorm, h = {h}",
            draw=partial(_rows, h=h),
            ours=lambda x, weight, bias: layer_norm(x, weight, bias, EPSILON),
            formula=lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPSILON),
            moved=lambda x, weight, bias: size(x, x, weight, bias) + 8 * len(x),
            moved_back=lambda x, weight, bias: size(x, x, x, *(weight, bias) * 2) + 8 * len(x),
        )
    yield Case(
        name="RMSNorm, h = 4096",
        draw=lambda draw: _rows(draw, 4096)[:2],
        ours=lambda x, weight: rms_norm(x, weight, EPSILON),
        formula=lambda x, weight: F.rms_norm(x, weight.shape, weight, EPSILON),
        moved=lambda x, weight: size(x, x, weight) + 4 * len(x),
        moved_back=lambda x, weight: size(x, x, x, weight, weight) + 4 * len(x),
    )


def _with_residual(draw: Draw) -> Inputs:
    x, weight, bias = _rows(draw, 2048)
    key = draw.below(2**62, 1)
    return x, torch.randn_like(x), torch.randn_like(bias), weight, bias, key


def _norm_after_add(
    x: Tensor,
    residual: Tensor,
    bias: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    key: Tensor,
    *,
    p: float,
) -> tuple[Tensor, Tensor]:
    drawn = philox.Draw(key, 0) if p else None
    return norm_after_add(x, bias, residual, weight, norm_bias, EPSILON, probability=p, draw=drawn)


def _added_and_normalised(
    x: Tensor,
    residual: Tensor,
    bias: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    key: Tensor,
    *,
    p: float,
) -> tuple[Tensor, Tensor]:
    total = residual + F.dropout(x + bias, p)
    return total, F.layer_norm(total, weight.shape, weight, norm_bias, EPSILON)


def _moved_back(x: Tensor, *_: Tensor, p: float) -> int:
    # Without dropout both terms of the sum have the same gradient.
    return (5 if p else 4) * size(x) + 8 * len(x)


def _residual_cases() -> Iterable[Case]:
    yield Case(
        name="bias, dropout, add",
        draw=lambda draw: (*_with_residual(draw)[:3], draw.below(2**62, 1)),
        ours=lambda x, residual, bias, key: bias_dropout_add(
            x, bias, residual, probability=DROPPED, draw=philox.Draw(key, 0)
        ),
        formula=lambda x, residual, bias, key: residual + F.dropout(x + bias, DROPPED),
        moved=lambda x, residual, bias, key: size(x, x, x, bias),
        # The residual's gradient is the result's own.
        moved_back=lambda x, residual, bias, key: size(x, x, bias),
        comparable=False,
    )
    for p, words in ((0.0, ""), (DROPPED, ", dropout")):
        yield Case(
            name=f"bias{words}, add, LayerNorm",
            draw=_with_residual,
            ours=partial(_norm_after_add, p=p),
            formula=partial(_added_and_normalised, p=p),
            moved=lambda x, *_: 4 * size(x) + 8 * len(x),
            moved_back=partial(_moved_back, p=p),
            comparable=p == 0.0,
        )


def _queries_keys_values(draw: Draw) -> Inputs:
    s, b, g = draw.pick(2048, 5), draw.pick(8, 2), draw.pick(16, 3)
    d = draw.pick(128, 32, 6)
    by = rotation(torch.arange(s, device=draw.device)[:, None], d, 10000.0, draw.dtype)
    return draw.normal(s, b, g, 3, d), by


def _turned(mixed: Tensor, by: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """[s, b, g, 3, d] with one query for each key."""
    query, key, value = mixed.unbind(3)
    return rotate(query, by), rotate(key, by), value


def _rotary_cases() -> Iterable[Case]:
    yield Case(
        name="rotary positions",
        draw=_queries_keys_values,
        ours=lambda mixed, by: split_heads(mixed, by, 1),
        formula=_turned,
        moved=lambda mixed, by: size(mixed, mixed, *by),
        moved_back=lambda mixed, by: size(mixed, mixed, *by),
    )


def _scores(draw: Draw, z: int = 2048) -> Inputs:
    """[b, n, s, z], as many at every z."""
    is_long = z > 2048
    s, n = draw.pick(2048, 3 if is_long else 17), draw.pick(2**27 // (z * 2048), 1)
    columns = draw.pick(z, z if is_long else 40, z + 1 if is_long else 33)
    return (draw.normal(2, n, s, columns),)


def _masked_scores(draw: Draw) -> Inputs:
    (scores,) = _scores(draw)
    seen = draw.positive(scores.size(0), 1, 1, scores.size(-1)) < 0.8
    seen[..., 0] = True
    return scores, seen


def _causal_softmax(scores: Tensor) -> Tensor:
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return (SCALE * scores).masked_fill(ahead, float("-inf")).softmax(-1)


def _softmax_cases() -> Iterable[Case]:
    for z in (2048, 16384):
        yield Case(
            name=f"softmax of {z}",
            draw=partial(_scores, z=z),
            ours=scaled_softmax,
            formula=lambda scores: F.softmax(scores, dim=-1),
            moved=lambda scores: size(scores, scores),
            moved_back=lambda scores: size(scores, scores, scores),
        )
    yield Case(
        name="scaled masked softmax",
        draw=_masked_scores,
        ours=lambda scores, seen: scaled_softmax(scores, seen, scale=SCALE),
        formula=lambda scores, seen: F.softmax(
            (SCALE * scores).masked_fill(~seen, float("-inf")), dim=-1
        ),
        moved=lambda scores, seen: size(scores, scores, seen),
        moved_back=lambda scores, seen: size(scores, scores, scores),
    )
    yield Case(
        name="scaled causal softmax",
        draw=_scores,
        ours=lambda scores: scaled_softmax(scores, scale=SCALE, causal=True),
        formula=_causal_softmax,
        # What is ahead need not be read, but zeros are written there.
        moved=lambda scores: size(scores) * 3 // 2,
        moved_back=lambda scores: size(scores) * 2,
    )


def _logits(draw: Draw) -> Inputs:
    n, v = draw.pick(8192, 9), draw.pick(50304, 1000, 777)
    return draw.normal(n, v), draw.below(v, n)


def _with_statistics(draw: Draw) -> Inputs:
    """Logits, targets, and per row maximum, sum and gradient of the loss."""
    logits, targets = _logits(draw)
    maxima = logits.amax(dim=1).float()
    totals = (logits.float() - maxima[:, None]).exp_().sum(dim=1)
    return logits, targets, maxima, totals, draw.positive(len(logits))


def _logits_gradient(
    logits: Tensor, targets: Tensor, maxima: Tensor, totals: Tensor, grads: Tensor
) -> Tensor:
    weights = (logits.float() - maxima[:, None]).exp() / totals[:, None]
    columns = torch.arange(logits.size(1), device=logits.device)
    weights = weights - (columns == targets[:, None]).float()
    return (weights * grads[:, None]).to(logits.dtype)


def _cross_entropy_cases() -> Iterable[Case]:
    yield Case(
        name="cross entropy",
        draw=_logits,
        ours=lambda logits, targets: row_losses(logits, targets, 0, logits.size(1))[0],
        formula=lambda logits, targets: F.cross_entropy(logits.float(), targets, reduction="none"),
        torch=lambda logits, targets: F.cross_entropy(logits, targets, reduction="none").float(),
        moved=lambda logits, targets: size(logits, targets) + 16 * len(targets),
    )
    yield Case(
        name="cross entropy, gradient",
        draw=_with_statistics,
        ours=lambda logits, targets, maxima, totals, grads: logits_gradient(
            logits, targets, maxima, totals, grads, 0, logits.size(1), overwrite=False
        ),
        formula=_logits_gradient,
        moved=lambda logits, *rows: size(logits, logits, *rows),
    )


class _Shard:
    """Weights, their copy in half precision, gradient and moments, and PyTorch's optimizer."""

    def __init__(self, draw: Draw) -> None:
        count = draw.pick(2**27, 5008, 5003)
        self.weights, self.gradient, self.mean = (
            draw.normal(count, dtype=torch.float32) for _ in range(3)
        )
        self.square = draw.positive(count)
        half = torch.bfloat16 if draw.dtype == torch.float32 else draw.dtype
        self.rounded = self.weights.to(half)
        self.step = torch.ones((), device=draw.device)
        self.skipped = torch.zeros((), dtype=torch.bool, device=draw.device)
        self.divisor = torch.full((), 1.5, device=draw.device)
        parameter = torch.nn.Parameter(self.weights)
        parameter.grad = self.gradient
        self._adam = torch.optim.AdamW(
            [parameter],
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=ADAM_EPSILON,
            weight_decay=DECAY,
            fused=True,
        )

    @property
    def moved(self) -> int:
        """Bytes: all is read, all but the gradient is written."""
        read = size(self.weights, self.gradient, self.mean, self.square)
        return read + size(self.weights, self.mean, self.square, self.rounded)

    def ours(self) -> None:
        """The step by the kernel."""
        adamw_(
            *([self.weights], [self.rounded], [self.gradient], [self.mean], [self.square], [DECAY]),
            step=self.step,
            skipped=self.skipped,
            divisor=self.divisor,
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=ADAM_EPSILON,
        )

    def torch(self) -> None:
        """The step by PyTorch's fused optimizer, and a copy."""
        self._adam.step()
        self.rounded.copy_(self.weights.detach())

    def formula(self) -> None:
        """The step as it is written (arXiv 1711.05101)."""
        _adamw(
            *(self.weights, self.rounded, self.gradient, self.mean, self.square),
            *(self.step, self.divisor),
        )


def _adamw(
    weights: Tensor,
    rounded: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    divisor: Tensor,
) -> None:
    gradient = gradient / divisor
    step += 1
    mean.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    root = (square / (1 - BETAS[1] ** step)).sqrt() + ADAM_EPSILON
    update = mean / (1 - BETAS[0] ** step) / root
    weights.mul_(1 - LEARNING_RATE * DECAY).sub_(update, alpha=LEARNING_RATE)
    rounded.copy_(weights)


def _gradients(draw: Draw) -> list[Tensor]:
    return [draw.normal(draw.pick(2**24, 1111 * i), dtype=torch.float32) for i in range(1, 9)]


def _small_gradients(draw: Draw) -> Inputs:
    count, n = draw.pick(192, 70), draw.pick(2**16, 64, 67)
    flat = draw.normal(count * n, dtype=torch.float32)
    return flat, [n * place for place in range(count)], [draw.normal(n) for _ in range(count)]


def _add_at(flat: Tensor, starts: Sequence[int], terms: Sequence[Tensor]) -> None:
    for start, term in zip(starts, terms, strict=True):
        flat[start : start + len(term)].add_(term)


def _optimizer_cases() -> Iterable[Case]:
    yield Case(
        name="AdamW, float32 masters",
        draw=lambda draw: (_Shard(draw),),
        ours=_Shard.ours,
        formula=_Shard.formula,
        torch=_Shard.torch,
        moved=lambda shard: shard.moved,
        comparable=False,
    )
    yield Case(
        name="norm of the gradient",
        draw=lambda draw: (_gradients(draw),),
        ours=sum_of_squares,
        formula=lambda tensors: sum(x.square().sum() for x in tensors),
        torch=lambda tensors: torch.stack(torch._foreach_norm(tensors)).square().sum(),
        moved=lambda tensors: size(*tensors),
    )
    yield Case(
        name="scaling of the gradient",
        draw=lambda draw: (_gradients(draw), torch.full((), 1.0001, device=draw.device)),
        ours=divide_,
        formula=lambda tensors, divisor: [x.div_(divisor) for x in tensors],
        torch=torch._foreach_div_,
        moved=lambda tensors, divisor: 2 * size(*tensors),
        comparable=False,
    )
    yield Case(
        name="small gradients into float32 ones",
        draw=_small_gradients,
        ours=add_at_,
        formula=_add_at,
        moved=lambda flat, starts, terms: 2 * size(flat) + size(*terms),
        comparable=False,
    )


def _matrix(draw: Draw) -> Inputs:
    x = draw.normal(draw.pick(16384, 70), draw.pick(8192, 144))
    return x, torch.full((), 0.01, device=draw.device)


def _in_8_bits(x: Tensor, scale: Tensor) -> Tensor:
    limit = torch.finfo(E4M3).max
    return (x.float() / scale).clamp(-limit, limit).to(E4M3)


def _factor(draw: Draw) -> Inputs:
    x, scale = _matrix(draw)
    return (Factor(_in_8_bits(x, scale), scale),)


def _cast_both_ways(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    values, turned = fp8_cast(x, scale, E4M3, transposed=True)
    return values, turned[:, : len(x)]


def _fp8_cases() -> Iterable[Case]:
    yield Case(
        name="fp8, scale",
        draw=_matrix,
        ours=lambda x, scale: fp8_scale(x, E4M3),
        formula=lambda x, scale: x.abs().amax().float() / torch.finfo(E4M3).max,
        moved=lambda x, scale: size(x),
    )
    yield Case(
        name="fp8, cast",
        draw=_matrix,
        ours=lambda x, scale: fp8_cast(x, scale, E4M3)[0],
        formula=_in_8_bits,
        moved=lambda x, scale: size(x) + x.numel(),
    )
    yield Case(
        name="fp8, cast and transpose",
        draw=_matrix,
        ours=_cast_both_ways,
        formula=lambda x, scale: (_in_8_bits(x, scale), _in_8_bits(x, scale).t().contiguous()),
        moved=lambda x, scale: size(x) + 2 * x.numel(),
    )
    yield Case(
        name="fp8, transpose",
        draw=_factor,
        ours=lambda factor: fp8_transpose(factor).values[:, : len(factor.values)],
        formula=lambda factor: factor.values.t().contiguous(),
        moved=lambda factor: 2 * size(factor.values),
    )


CASES: tuple[Case, ...] = (
    *_norm_cases(),
    *_residual_cases(),
    *_mlp_cases(),
    *_rotary_cases(),
    *_softmax_cases(),
    *_cross_entropy_cases(),
    *_optimizer_cases(),
    *_fp8_cases(),
)
