"""Products of the split linear layers in 8 bits, and the scales that they share over a step.

Three factors take part, each with a scale of its own: the input x and the weight W in e4m3, and
the gradient g of the output in e4m3 or, with "hybrid", in e5m2 (arXiv 2209.05433)::

    y = x W^T        g W                    g^T x
    x, W as they     g as it lies,          both transposed: x is cast both ways in the forward
    lie              W transposed           pass, and only its 8 bits are held

Recipe "tensorwise" scales by the largest magnitude of the tensor at hand. "delayed" takes that of
the last steps and saves a pass over the tensor; what exceeds it is cut off. All of a step's
micro-batches have the same delayed scales, and the magnitudes are taken over all ranks that hold
the layer: neither the layout nor recomputation changes a scale. Where no step is known yet, scaling
is tensorwise.

With sequence parallelism the input is gathered before it is cast. Each rank holds its own part of
the 8 bits, and these are gathered for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.errors import ConfigError
from megatron.mpu.collectives import MAX, all_gather, all_reduce, own_piece
from megatron.mpu.parallel_state import Axis, ParallelState
from megatron.mpu.products import flatten
from megatron.mpu.shard_spec import ShardSpec
from megatron.ops.fp8 import (
    ALIGNMENT,
    E4M3,
    E5M2,
    Factor,
    fp8_cast,
    fp8_scale,
    fp8_transpose,
    require_fp8,
    scaled_product,
)

INPUT, WEIGHT, GRADIENT = range(3)


@dataclass(frozen=True)
class Fp8Recipe:
    """How products are computed in 8 bits.

    Attributes:
        gradient: format of gradients; the other factors have e4m3.
        steps: how many of the last steps scales come from; 0 where from the tensor at hand.
    """

    gradient: torch.dtype
    steps: int = 0

    @classmethod
    def of(cls, model: ModelConfig) -> Fp8Recipe | None:
        """What the flags ask for; None where the parameters are not bfloat16.

        A conversion builds its networks in float32, from the configuration of any run.
        """
        if model.fp8_format is None or not model.bf16:
            return None
        delayed = model.fp8_recipe == "delayed"
        return cls(
            gradient=E5M2 if model.fp8_format == "hybrid" else E4M3,
            steps=model.fp8_amax_history_len if delayed else 0,
        )


class Fp8Products:
    """The products of one layer in 8 bits; see `megatron.mpu.products.Products`.

    Attributes:
        name: the weight's global name.
        recent: the largest magnitudes of earlier steps by factor, float32 scalars, zero where
            unknown; None where scaling is tensorwise.
        largest: those of this step so far.

    Raises:
        ConfigError: the device or the sizes cannot have such products.
    """

    def __init__(self, recipe: Fp8Recipe, weight: Tensor) -> None:
        spec: ShardSpec = weight.shard_spec  # type: ignore[attr-defined]
        require_fp8(weight.device)
        if any(size % ALIGNMENT for size in weight.shape):
            sizes = " x ".join(str(size) for size in weight.shape)
            raise ConfigError(
                f"--fp8-format needs weights whose sizes are divisible by {ALIGNMENT}: "
                f"{spec.name} is {sizes} on each tensor rank"
            )
        self.recipe, self.name, self._dtype = recipe, spec.name, weight.dtype
        self.recent: tuple[Tensor, ...] | None = None
        self.largest: tuple[Tensor, ...] | None = None

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gather_axis: Axis | None,
        *,
        differentiated: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        total = x if gather_axis is None else all_gather(x, gather_axis)
        own, turned = self._cast(
            flatten(total),
            INPUT,
            transposed=differentiated and gather_axis is None,
            counts=differentiated,
        )
        rows = self._weight_rows(weight)
        y = scaled_product(own, rows, self._dtype, bias=bias, fast=True)
        # Not a view for autograd, which may be told later that it is changed in place.
        y = torch.ops.aten._unsafe_view(y, (*total.shape[:-1], weight.size(0)))
        if not differentiated:
            return y, ()
        kept = turned.values
        if gather_axis is not None:
            # A copy: a view would hold the whole.
            kept = own_piece(own.values.view(torch.uint8).view(total.shape), gather_axis, 0).clone()
        return y, (kept, own.scale, rows.scale)

    def factors(
        self, grads: Tensor, *, need_input: bool, need_weight: bool
    ) -> tuple[Factor, Factor]:
        return self._cast(grads, GRADIENT, as_it_lies=need_input, transposed=need_weight)

    def input_gradient(self, factor: Factor, weight: Tensor, held: Sequence[Tensor]) -> Tensor:
        columns = self._weight_columns(weight, scale=held[2])
        return scaled_product(factor, columns, self._dtype)

    def weight_gradient(
        self, factor: Factor, held: Sequence[Tensor], gathered: Tensor | None
    ) -> Tensor:
        x, scale = held[0], held[1]
        if gathered is None:
            return scaled_product(factor, Factor(x, scale), self._dtype)
        whole = Factor(flatten(gathered).view(E4M3), scale)
        return scaled_product(factor, fp8_transpose(whole), self._dtype)

    def add_weight_gradient(
        self, total: Tensor, factor: Factor, held: Sequence[Tensor], gathered: Tensor | None
    ) -> None:
        total.add_(self.weight_gradient(factor, held, gathered))

    def _weight_rows(self, weight: Tensor) -> Factor:
        """W as it lies."""
        kept = _kept_weights(weight)
        if kept is None:
            return self._cast(weight, WEIGHT)[0]
        if self not in kept:
            kept[self] = self._cast(weight, WEIGHT, transposed=True)
        return kept[self][0]

    def _weight_columns(self, weight: Tensor, scale: Tensor) -> Factor:
        """W^T, with the scale that it had in the forward pass."""
        kept = _kept_weights(weight)
        if kept is not None and self in kept:
            return kept[self][1]
        _, turned = fp8_cast(weight, scale, E4M3, as_it_lies=False, transposed=True)
        return Factor(turned, scale)

    def _cast(
        self,
        x: Tensor,
        place: int,
        *,
        as_it_lies: bool = True,
        transposed: bool = False,
        counts: bool = True,
    ) -> tuple[Factor, Factor]:
        """A factor as it lies and transposed; whether its largest magnitude counts for later."""
        x, format = x.contiguous(), self.recipe.gradient if place == GRADIENT else E4M3
        scale = fp8_scale(x, format, None if self.recent is None else self.recent[place])
        values, turned = fp8_cast(
            x,
            scale,
            format,
            as_it_lies=as_it_lies,
            transposed=transposed,
            kept=self.largest[place] if counts and self.largest is not None else None,
        )
        return Factor(values, scale), Factor(turned, scale)


# The weights in 8 bits, as they lie and transposed, of the step that is under way. Of the process,
# not of a thread: autograd runs the backward pass of a GPU on threads of its own.
_KeptWeights = dict[Fp8Products, tuple[Factor, Factor]]
_current: list[_KeptWeights] = []


def _kept_weights(weight: Tensor) -> _KeptWeights | None:
    """Where the step keeps them; None outside of one, and in a graph that is run in others, too."""
    if not _current or torch.compiler.is_compiling():
        return None
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return _current[-1]


class Fp8Scaling:
    """What the 8-bit layers of a rank's chunks share over the steps of a run.

    Its collectives run over the tensor and the data ranks: all ranks must make one and take their
    steps together.
    """

    def __init__(self, chunks: Iterable[nn.Module], state: ParallelState) -> None:
        modules = (module for chunk in chunks for module in chunk.modules())
        found = (getattr(module, "products", None) for module in modules)
        self._layers = [each for each in found if isinstance(each, Fp8Products)]
        self._state = state
        self._delayed = [layer for layer in self._layers if layer.recipe.steps]
        if not self._delayed:
            return
        count, steps = len(self._delayed), self._delayed[0].recipe.steps
        self._history = torch.zeros(count, steps, 3, device=state.device)
        self._recent = torch.zeros(count, 3, device=state.device)
        self._largest = torch.zeros(count, 3, device=state.device)
        for layer, recent, largest in zip(self._delayed, self._recent, self._largest, strict=True):
            layer.recent, layer.largest = recent.unbind(), largest.unbind()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the forward and backward passes of a step, in which no weight changes.

        Each weight is cast once. Delayed scales stay as they are; afterwards this step's
        magnitudes take the place of the oldest.
        """
        if not self._layers:
            yield
            return
        if self._delayed:
            torch.amax(self._history, dim=1, out=self._recent)
            self._largest.zero_()
        _current.append({})
        try:
            yield
        finally:
            _current.pop()
        if self._delayed:
            self._remember()

    def state_tensors(self) -> Iterator[tuple[str, Tensor, ShardSpec]]:
        """The magnitudes of the last steps, f32 [steps, 3] for each layer, as a checkpoint has it.

        The same on all ranks that hold the layer. Writing into them restores the state.
        """
        for place, layer in enumerate(self._delayed):
            history = self._history[place]
            key = f"optimizer.fp8_history.{layer.name}"
            yield key, history, ShardSpec(layer.name, tuple(history.shape))

    def _remember(self) -> None:
        # A step with an overflow is skipped, and says nothing of the next one's magnitudes.
        newest = torch.where(self._largest.isfinite(), self._largest, 0.0)
        for axis in (self._state.tensor, self._state.data):
            all_reduce(newest, axis, MAX)
        self._history[:, 1:] = self._history[:, :-1].clone()
        self._history[:, 0] = newest
