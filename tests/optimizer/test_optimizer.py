from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.mpu.parallel_state import ParallelState
from megatron.optimizer import Optimizer, build_optimizer
from tests.optimizer.support import (
    Net,
    PlainTraining,
    accumulate_gradients,
    make_config,
    micro_batches,
)

SINGLE = ParallelState.single()
ADAM: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
OPTIONS = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-6, "weight_decay": 0.1}
STEPS = 6


def accumulate(optimizer: Optimizer, net: Net, batches: list[Tensor]) -> None:
    accumulate_gradients(
        optimizer.gradients, net, batches, len(batches), scale=optimizer.loss_scale
    )


def rates() -> list[float]:
    return [0.01 * (step + 1) / STEPS for step in range(STEPS)]


def worst_difference(net: Net, plain: PlainTraining) -> float:
    """Largest difference of any weight, relative to the largest weight of its tensor."""
    pairs = zip(net.parameters(), plain.parameters, strict=True)
    return max(((own - other).abs().max() / other.abs().max()).item() for own, other in pairs)


@pytest.mark.parametrize("clip", [0.0, 0.05, 100.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_adam_equals_torch_per_parameter(dtype: torch.dtype, tolerance: float, clip: float) -> None:
    net = Net(SINGLE, dtype)
    plain = PlainTraining(net, torch.optim.AdamW, **ADAM)
    config = make_config(clip_grad=clip, bucket_size=300, **OPTIONS)
    optimizer = build_optimizer(config, [net], SINGLE)
    for step, lr in enumerate(rates()):
        batches = micro_batches(3, step)
        accumulate(optimizer, net, batches)
        result = optimizer.step(lr)
        norm = plain.step(batches, lr, clip)
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=max(tolerance, 1e-12))
        assert not result.skipped
    assert worst_difference(net, plain) < tolerance


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torch_per_parameter(momentum: float) -> None:
    net = Net(SINGLE, torch.float64)
    plain = PlainTraining(net, torch.optim.SGD, lr=0.1, momentum=momentum, weight_decay=0.1)
    config = make_config(optimizer="sgd", sgd_momentum=momentum, weight_decay=0.1)
    optimizer = build_optimizer(config, [net], SINGLE)
    for step, lr in enumerate(rates()):
        batches = micro_batches(2, step)
        accumulate(optimizer, net, batches)
        optimizer.step(10 * lr)
        plain.step(batches, 10 * lr, clip=1.0)
    assert worst_difference(net, plain) < 1e-12


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_steps_its_float32_masters(precision: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    net = Net(SINGLE, dtype)
    plain = PlainTraining(Net(SINGLE, dtype).float(), torch.optim.AdamW, **ADAM)
    config = make_config(
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        initial_loss_scale=1024.0,
        clip_grad=0.05,
        **OPTIONS,
    )
    optimizer = build_optimizer(config, [net], SINGLE)
    for step, lr in enumerate(rates()):
        accumulate(optimizer, net, micro_batches(2, step))
        # Backward of half precision is its own; the update is float32's on the same gradients.
        for own, other in zip(net.parameters(), plain.parameters, strict=True):
            other.grad = own.main_grad / optimizer.loss_scale
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters, 0.05)
        for group in plain.optimizer.param_groups:
            group["lr"] = lr
        plain.optimizer.step()
        result = optimizer.step(lr)
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    masters = {key: part for key, part, _, _ in optimizer.state_tensors()}
    for own, other in zip(net.parameters(), plain.parameters, strict=True):
        master = masters[f"optimizer.master.{own.shard_spec.name}"]
        master = master.view(other.shape)
        assert torch.allclose(master, other, rtol=2e-6, atol=1e-7)
        assert torch.equal(own, master.to(dtype))


def test_fp16_gradient_is_free_of_the_loss_scale() -> None:
    norms = []
    for scale in (1.0, 4096.0):
        net = Net(SINGLE, torch.float16)
        optimizer = build_optimizer(make_config(fp16=True, loss_scale=scale), [net], SINGLE)
        accumulate(optimizer, net, micro_batches(2, 0))
        norms.append(optimizer.step(0.01).grad_norm.item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_overflow_skips_the_step_and_lowers_the_scale() -> None:
    net = Net(SINGLE, torch.float16)
    config = make_config(fp16=True, initial_loss_scale=2.0**24, hysteresis=1, loss_scale_window=2)
    optimizer = build_optimizer(config, [net], SINGLE)
    before = snapshot(optimizer, net)
    accumulate(optimizer, net, micro_batches(2, 0))
    result = optimizer.step(0.01)
    assert result.skipped
    assert_equal(before, snapshot(optimizer, net))
    assert optimizer.state_dict()["steps"] == 0
    assert optimizer.loss_scale.item() == 2.0**23


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_gradient_that_is_not_finite_changes_nothing(
    dtype: torch.dtype, poison: float, name: str
) -> None:
    net = Net(SINGLE, dtype)
    config = make_config(optimizer=name, bf16=dtype == torch.bfloat16)
    optimizer = build_optimizer(config, [net], SINGLE)
    for step in range(4):
        accumulate(optimizer, net, micro_batches(2, step))
        before = snapshot(optimizer, net)
        poisoned = step in (0, 2)
        if poisoned:
            net.norm_bias.main_grad[3] = poison
        result = optimizer.step(0.01)
        assert bool(result.skipped) == poisoned
        after = snapshot(optimizer, net)
        if poisoned:
            assert_equal(before, after)
        else:
            assert any(not torch.equal(before[key], after[key]) for key in before)
    if name == "adam":
        assert optimizer.state_dict()["steps"] == 2


def snapshot(optimizer: Optimizer, net: Net) -> dict[str, Tensor]:
    tensors = {name: p.detach().clone() for name, p in net.named_parameters()}
    return tensors | {key: part.clone() for key, part, _, _ in optimizer.state_tensors()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_resuming_from_the_saved_state_is_bitwise_equal(dtype: torch.dtype, name: str) -> None:
    config = make_config(
        optimizer=name, fp16=dtype == torch.float16, initial_loss_scale=256.0, loss_scale_window=2
    )
    net = Net(SINGLE, dtype)
    optimizer = build_optimizer(config, [net], SINGLE)
    for step in range(3):
        accumulate(optimizer, net, micro_batches(2, step))
        optimizer.step(0.01)
    resumed_net = Net(SINGLE, dtype)
    resumed = build_optimizer(config, [resumed_net], SINGLE)
    resumed_net.load_state_dict(net.state_dict())
    for (key, own, spec, first), (saved_key, saved, _, _) in zip(
        resumed.state_tensors(), optimizer.state_tensors(), strict=True
    ):
        assert key == saved_key
        assert (first, own.numel()) == (0, prod(spec.local_shape(1)))
        own.copy_(saved)
    resumed.load_state_dict(optimizer.state_dict())
    for step in range(3, 6):
        for each, model in ((optimizer, net), (resumed, resumed_net)):
            accumulate(each, model, micro_batches(2, step))
            each.step(0.01)
    assert_equal(snapshot(optimizer, net), snapshot(resumed, resumed_net))
    assert optimizer.state_dict() == resumed.state_dict()


def test_state_keys_follow_the_parameters() -> None:
    net = Net(SINGLE, torch.bfloat16)
    names = [p.shard_spec.name for p in net.parameters()]
    for name, kinds in (
        ("adam", ("exp_avg", "exp_avg_sq", "master")),
        ("sgd", ("momentum_buffer", "master")),
    ):
        optimizer = build_optimizer(make_config(bf16=True, optimizer=name), [net], SINGLE)
        keys = [key for key, *_ in optimizer.state_tensors()]
        assert sorted(keys) == sorted(f"optimizer.{kind}.{n}" for kind in kinds for n in names)


def test_masters_follow_weights_that_were_loaded_alone() -> None:
    net = Net(SINGLE, torch.bfloat16)
    optimizer = build_optimizer(make_config(bf16=True), [net], SINGLE)
    with torch.no_grad():
        net.wide.weight.fill_(0.5)
    optimizer.reload_masters()
    masters = {key: part for key, part, _, _ in optimizer.state_tensors()}
    assert (masters["optimizer.master.wide.weight"] == 0.5).all()


def test_parameter_norm_is_of_the_weights() -> None:
    net = Net(SINGLE)
    expected = torch.cat([p.detach().flatten() for p in net.parameters()]).double().norm()
    optimizer = build_optimizer(make_config(), [net], SINGLE)
    assert optimizer.parameter_norm().item() == pytest.approx(expected.item(), rel=1e-6)
    assert optimizer.parameter_count() == sum(p.numel() for p in net.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "mode", [{}, {"distributed": True}, {"distributed": True, "shard_gradients": True}]
)
def test_a_step_never_waits_for_the_gpu(mode: dict[str, bool]) -> None:
    state = ParallelState.single("cuda")
    net = Net(state, torch.float16)
    optimizer = build_optimizer(make_config(fp16=True, **mode), [net], state)
    batches = [tokens.cuda() for tokens in micro_batches(2, 0)]
    accumulate(optimizer, net, batches)
    optimizer.step(0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.gradients.zero()
        optimizer.gradients.finish()
        result = optimizer.step(0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.grad_norm.item() == 0.0
