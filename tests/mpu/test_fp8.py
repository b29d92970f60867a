"""Linear layers in 8 bits: products by hand in float64, what is held, scales over steps, ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megatron.errors import ConfigError
from megatron.mpu import (
    ColumnParallelLinear,
    ParallelState,
    RowParallelLinear,
    Topology,
    defer_weight_gradients,
    recompute,
)
from megatron.mpu.collectives import own_piece
from megatron.mpu.fp8 import GRADIENT, INPUT, WEIGHT, Fp8Products, Fp8Recipe, Fp8Scaling
from megatron.mpu.init import normal
from megatron.ops import kernels
from megatron.ops.fp8 import E4M3, E5M2, fp8_cast
from megatron.training.trainer import Trainer
from tests.distributed import run_distributed
from tests.ops.kernel_cases import DEVICE, ON_GPU, relative_error
from tests.training.tiny import TASKS, micro_batches, random_samples, tiny_config

TENSORWISE, DELAYED = Fp8Recipe(E5M2), Fp8Recipe(E5M2, steps=3)
IN, OUT = 32, 48
SINGLE = ParallelState.single(DEVICE)
# A GPU sums with fewer bits than float32 has.
SUMMED = 2e-3 if ON_GPU else 1e-6

pytestmark = pytest.mark.skipif(
    ON_GPU and torch.cuda.get_device_capability() < (8, 9), reason="the GPU has no 8-bit products"
)


def _column(
    fp8: Fp8Recipe | None, state: ParallelState = SINGLE, dtype: torch.dtype = torch.float32
) -> ColumnParallelLinear:
    layer = ColumnParallelLinear(
        IN, OUT, name="layer", state=state, init_method=normal(1.0, 5), dtype=dtype, fp8=fp8
    )
    assert layer.bias is not None
    layer.bias.data.copy_(_draw(OUT, seed=1))
    return layer


def _draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _by_hand(x: Tensor, format: torch.dtype, largest: float | None = None) -> Tensor:
    """x as a factor stands for it, in float64; PyTorch rounds."""
    limit = torch.finfo(format).max
    scale = (x.abs().max() if largest is None else torch.full_like(x[0, 0], largest)) / limit
    return (x * (1.0 / scale)).clamp(-limit, limit).to(format).double() * scale.double()


def _run(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Result, and the gradients of x and of the weight."""
    x = x.clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x)
    y.backward(grad)
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("how", ["returned", "main_grad", "deferred"])
@pytest.mark.parametrize("gradient", [E4M3, E5M2])
def test_products_are_those_of_the_rounded_factors(gradient: torch.dtype, how: str) -> None:
    layer = _column(Fp8Recipe(gradient))
    weight, bias = layer.weight, layer.bias
    assert bias is not None
    x, grad = _draw(3, 7, IN).requires_grad_(), _draw(3, 7, OUT, seed=4) * 1e-3  # 21 rows: padded
    if how == "main_grad":
        weight.main_grad = torch.full_like(weight, 0.25)
    y = layer(x)
    with defer_weight_gradients() if how == "deferred" else nullcontext() as deferred:
        y.backward(grad)
    if deferred is not None:
        assert weight.grad is None
        deferred.compute()
    a, w, g = (
        _by_hand(t.detach(), format)
        for t, format in ((x.flatten(0, 1), E4M3), (weight, E4M3), (grad.flatten(0, 1), gradient))
    )
    assert relative_error(y.flatten(0, 1), a @ w.t() + bias.double()) < SUMMED
    assert x.grad is not None and bias.grad is not None
    assert relative_error(x.grad.flatten(0, 1), g @ w) < SUMMED
    found = weight.grad if how != "main_grad" else weight.main_grad - 0.25
    assert found is not None and relative_error(found, g.t() @ a) < 10 * SUMMED
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


def test_in_bfloat16_the_error_is_that_of_the_formats() -> None:
    x, grad = _draw(64, IN).bfloat16(), _draw(64, OUT, seed=4).bfloat16()
    found = _run(_column(TENSORWISE, dtype=torch.bfloat16), x, grad)
    exact = _run(_column(None, dtype=torch.float64), x.double(), grad.double())
    for got, wanted, expected in zip(found[:3], exact[:3], (0.036, 0.059, 0.059), strict=True):
        assert got.dtype == torch.bfloat16
        assert 0.5 * expected < relative_error(got, wanted) < 1.3 * expected


def test_only_8_bits_of_the_input_are_held() -> None:
    layer = _column(TENSORWISE)
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(_draw(16, IN).requires_grad_())
    assert sorted(t.numel() * t.element_size() for t in held if t is not layer.weight) == [
        4,
        4,
        16 * IN,
    ]
    held.clear()
    with torch.no_grad():
        layer(_draw(16, IN))
    assert not held


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    layer = _column(TENSORWISE)
    x = _draw(16, IN)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    layer.weight.requires_grad_(False)
    layer.weight.grad = None
    layer(x.requires_grad_()).sum().backward()
    assert layer.weight.grad is None and x.grad is not None


def test_a_step_casts_each_weight_once_and_the_next_one_anew() -> None:
    layer = _column(TENSORWISE)
    scaling = Fp8Scaling([layer], SINGLE)
    x, grad = _draw(16, IN), _draw(16, OUT, seed=4)
    alone = _run(layer, x, grad)
    with mock.patch("megatron.mpu.fp8.fp8_cast", wraps=fp8_cast) as cast:
        with scaling.step():
            within = [_run(layer, x, grad) for _ in range(3)]
        of_weight = [call for call in cast.call_args_list if call.args[0] is layer.weight]
        assert len(of_weight) == 1
    for found in within:
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    with torch.no_grad():
        layer.weight.data.mul_(-2.0)
    with scaling.step():
        doubled = _run(layer, x, grad)
    torch.testing.assert_close(doubled[1], -2.0 * alone[1])


@pytest.mark.parametrize("recipe", [TENSORWISE, DELAYED])
def test_kernels_change_no_bit(recipe: Fp8Recipe) -> None:
    found = []
    for choice in ("torch", "cuda" if ON_GPU else "emulated"):
        layer = _column(recipe)
        scaling = Fp8Scaling([layer], SINGLE)
        with kernels.using(choice, DEVICE):
            for size in (1.0, 2.0):
                with scaling.step():
                    last = _run(layer, _draw(21, IN) * size, _draw(21, OUT, seed=4))
        found.append([*last, *(history for _, history, _ in scaling.state_tensors())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compilation_changes_no_bit() -> None:
    found = []
    for compiled in (False, True):
        layer, _, scaling = _delayed()
        module = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        for size in (1.0, 0.5):
            with scaling.step():
                last = _run(module, _draw(16, IN) * size, _draw(16, OUT, seed=4))
        found.append([*last, _history(scaling)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _delayed() -> tuple[ColumnParallelLinear, Fp8Products, Fp8Scaling]:
    layer = _column(DELAYED)
    products = layer.products
    assert isinstance(products, Fp8Products)
    return layer, products, Fp8Scaling([layer], SINGLE)


def _history(scaling: Fp8Scaling) -> Tensor:
    ((_, history, _),) = scaling.state_tensors()
    return history


def test_delayed_scales_are_those_of_the_last_steps() -> None:
    layer, products, scaling = _delayed()
    base, grad = _draw(16, IN), _draw(16, OUT, seed=4)
    sizes = [1.0, 8.0, 2.0, 1.0, 1.0, 0.5]
    known: list[float] = []
    for size in sizes:
        with scaling.step():
            for part in (0.25, 1.0):  # of two micro-batches the larger counts
                found = _run(layer, base * size * part, grad)
            assert products.recent is not None
            expected = max(known[-3:], default=0.0)
            assert products.recent[INPUT].item() == expected
            x = _by_hand(base * size, E4M3, expected or None)
            w = _by_hand(layer.weight.detach(), E4M3)
            assert layer.bias is not None
            assert relative_error(found[0], x @ w.t() + layer.bias.detach()) < SUMMED
        known.append((base * size).abs().max().item())
    newest = _history(scaling)[0]
    assert newest[INPUT] == 0.5 * base.abs().max()
    assert newest[WEIGHT] == layer.weight.abs().max()
    assert newest[GRADIENT] == grad.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_overflow_is_seen_and_not_remembered(bad: float) -> None:
    layer, _, scaling = _delayed()
    x, grad = _draw(16, IN), _draw(16, OUT, seed=4)
    with scaling.step():
        _run(layer, x, grad)
    x[2, 3] = bad
    with scaling.step():
        found = _run(layer, x, grad)
    assert found[0][2].isnan().all() and found[2].isnan().any()
    assert _history(scaling)[0, INPUT] == 0 and _history(scaling).isfinite().all()
    with scaling.step():
        assert all(t.isfinite().all() for t in _run(layer, x.nan_to_num(0.0, 0.0), grad))


def test_neither_recomputation_nor_evaluation_changes_a_delayed_scale() -> None:
    histories, results = [], []
    for other in (False, True):
        layer, _, scaling = _delayed()
        for seed in range(3):
            x, grad = _draw(16, IN, seed=seed), _draw(16, OUT, seed=4 + seed)
            with scaling.step():
                if other:
                    wrapped = _Recomputed(layer)
                    results.append(_run(wrapped, x, grad))
                else:
                    results.append(_run(layer, x, grad))
            if other:
                with torch.no_grad():
                    layer(100.0 * x)
        histories.append(_history(scaling).clone())
    assert torch.equal(*histories)
    for one, two in zip(results[:3], results[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class _Recomputed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return recompute(self.layer, x, streams=SINGLE.streams)


def test_a_run_goes_on_bitwise_from_its_history() -> None:
    def steps(layer: ColumnParallelLinear, scaling: Fp8Scaling, seeds: range) -> Iterator[Tensor]:
        for seed in seeds:
            with scaling.step():
                yield from _run(layer, _draw(16, IN, seed=seed) * (1 + seed), _draw(16, OUT))

    layer, _, scaling = _delayed()
    whole = list(steps(layer, scaling, range(6)))
    layer, _, scaling = _delayed()
    list(steps(layer, scaling, range(3)))
    saved = [(key, tensor.clone(), spec) for key, tensor, spec in scaling.state_tensors()]
    assert [(key, spec.shape, spec.dim) for key, _, spec in saved] == [
        ("optimizer.fp8_history.layer.weight", (3, 3), None)
    ]
    layer, _, scaling = _delayed()
    _history(scaling).copy_(saved[0][1])
    resumed = list(steps(layer, scaling, range(3, 6)))
    assert all(torch.equal(a, b) for a, b in zip(whole[-len(resumed) :], resumed, strict=True))


def test_what_cannot_be_in_8_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--fp8-format .* divisible by 16: .*odd.weight is 24 x"):
        ColumnParallelLinear(
            IN,
            24,
            name="odd",
            state=SINGLE,
            init_method=normal(1.0, 5),
            dtype=torch.bfloat16,
            fp8=TENSORWISE,
        )


def test_the_recipe_is_what_the_flags_say() -> None:
    def recipe(**model: Any) -> Fp8Recipe | None:
        return Fp8Recipe.of(tiny_config(model={"fp64": False} | model).model)

    assert recipe(bf16=True) is None
    assert recipe(fp8_format="e4m3") is None
    assert recipe(bf16=True, fp8_format="e4m3") == Fp8Recipe(E4M3)
    delayed = {"fp8_format": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 7}
    assert recipe(bf16=True, **delayed) == Fp8Recipe(E5M2, steps=7)


def _pair(tensor: int, recipe: Fp8Recipe | None, sequence: bool) -> list[Tensor]:
    """Result, the gradient of x and the history of two layers that are split."""
    state = ParallelState.create(Topology(tensor, tensor=tensor))
    options: dict[str, Any] = {
        "state": state,
        "init_method": normal(0.1, 5),
        "dtype": torch.float32,
        "sequence_parallel": sequence,
        "fp8": recipe,
    }
    column = ColumnParallelLinear(IN, 64, name="column", **options)
    row = RowParallelLinear(64, IN, name="row", **options)
    scaling = Fp8Scaling([nn.Sequential(column, row)], state)
    whole, seed_grad = _draw(8, 2, IN).cpu(), _draw(8, 2, IN, seed=4).cpu()

    def own(tensor: Tensor) -> Tensor:
        return own_piece(tensor, state.tensor, 0).clone() if sequence else tensor.clone()

    results = []
    for step in range(2):
        x = own(whole * (1.0 - 0.25 * step)).requires_grad_()
        for parameter in (column.weight, row.weight):
            parameter.grad = None
        with scaling.step():
            y = row(torch.tanh(column(x)))
            with defer_weight_gradients() if step else nullcontext() as deferred:
                y.backward(own(seed_grad))
            if deferred is not None:
                deferred.compute()
        assert x.grad is not None
        assert column.weight.grad is not None and row.weight.grad is not None
        results += [y.detach(), x.grad, column.weight.grad, row.weight.grad]
    return [*results, *(history for _, history, _ in scaling.state_tensors())]


@pytest.mark.parametrize("recipe", [TENSORWISE, DELAYED])
def test_split_layers_equal_whole_ones_within_the_format(recipe: Fp8Recipe) -> None:
    exact = run_distributed(1, _pair, 1, None, False)[0]
    plain, split = (run_distributed(2, _pair, 2, recipe, sequence) for sequence in (False, True))
    places = len(exact)
    for place in range(places):
        parts = [rank[place] for rank in plain]
        pieces = [rank[place] for rank in split]
        if place % 4 < 2:  # the same on both ranks, or a part of the sequence on each
            assert torch.equal(*parts)
            parts, pieces = parts[:1], [torch.cat(pieces)]
        for one, other in zip(parts, pieces, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1 if place % 4 == 3 else 0)
        assert relative_error(joined, exact[place]) < 0.12
    for histories in zip(*(rank[places:] for rank in (*plain, *split)), strict=True):
        assert all(torch.equal(histories[0], other) for other in histories[1:])


def _losses(**model: Any) -> list[float]:
    config = tiny_config(
        model={"hidden_size": 32, "fp64": False, "bf16": True, "model_type": "gpt"} | model,
        train={"train_iters": 30},
    )
    trainer = Trainer(config, TASKS["gpt"](config), ParallelState.single())
    batches = micro_batches(random_samples(4, seed=3, model_type="gpt"), 2)
    return [trainer.step(batches).parts.item() for _ in range(30)]


def test_a_network_learns_as_it_does_in_bfloat16() -> None:
    plain = _losses()
    assert plain[-1] < 0.5 * plain[0]
    for format in ("e4m3", "hybrid"):
        losses = _losses(fp8_format=format)
        assert losses != plain
        assert losses == pytest.approx(plain, rel=0.05)
        assert losses == _losses(fp8_format=format)
