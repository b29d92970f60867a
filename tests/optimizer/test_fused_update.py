"""The rules behind the optimizer are one rule: kernels, apex and torch train alike."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.mpu.parallel_state import ParallelState
from megatron.mpu.topology import Topology
from megatron.ops import kernels
from megatron.optimizer import Optimizer, build_optimizer
from megatron.optimizer.update import ApexAdam, KernelAdamW, TorchUpdate
from tests.distributed import distributed
from tests.optimizer.support import Net, accumulate_gradients, make_config, micro_batches

SINGLE = ParallelState.single()
OPTIONS: dict[str, Any] = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-6}
KINDS = {torch.float32: {}, torch.bfloat16: {"bf16": True}, torch.float16: {"fp16": True}}
STEPS = 10


class Run:
    """A network and its optimizer, with kernels or without."""

    def __init__(
        self,
        choice: str,
        dtype: torch.dtype = torch.float32,
        state: ParallelState = SINGLE,
        **options: Any,
    ) -> None:
        self.choice = choice
        self.net = Net(state, dtype)
        config = make_config(**{**OPTIONS, **KINDS[dtype], **options})
        with kernels.using(choice):
            self.optimizer = build_optimizer(config, [self.net], state)

    def accumulate(self, step: int, own: slice = slice(None)) -> None:
        self.optimizer.finish_gather()
        batches = micro_batches(2, step)
        scale = self.optimizer.loss_scale
        accumulate_gradients(self.optimizer.gradients, self.net, batches[own], 2, scale)

    def step(self, lr: float = 0.01) -> bool:
        with kernels.using(self.choice):
            return bool(self.optimizer.step(lr).skipped)

    def everything(self) -> dict[str, Tensor]:
        self.optimizer.finish_gather()
        state = {key: part for key, part, _, _ in self.optimizer.state_tensors()}
        parameters = {name: p.detach() for name, p in self.net.named_parameters()}
        return {key: t.clone() for key, t in (parameters | state).items()}

    def take_over(self, other: Run) -> None:
        """Go on from the other's state, as from a checkpoint."""
        self.net.load_state_dict(other.net.state_dict())
        states = (run.optimizer.state_tensors() for run in (self, other))
        for (key, own, _, first), (other_key, saved, _, other_first) in zip(*states, strict=True):
            assert (key, first) == (other_key, other_first)
            own.copy_(saved)
        self.optimizer.load_state_dict(other.optimizer.state_dict())


def hand_on_gradients(giver: Optimizer, taker: Optimizer) -> None:
    for own, given in zip(taker.gradients.shards, giver.gradients.shards, strict=True):
        own.gradients.copy_(given.gradients)


def assert_alike(one: Run, other: Run, tolerance: float = 1e-6) -> None:
    mine, others = one.everything(), other.everything()
    assert mine.keys() == others.keys()
    for key in mine:
        difference = (mine[key].double() - others[key].double()).norm()
        assert difference <= tolerance * others[key].double().norm(), key
    assert one.optimizer.state_dict() == other.optimizer.state_dict()


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_kernels_train_as_torch_does(clip: float) -> None:
    runs = [Run(choice, clip_grad=clip) for choice in ("emulated", "torch")]
    for step in range(STEPS):
        for run in runs:
            run.accumulate(step)
            assert not run.step(lr=0.01 * (step + 1) / STEPS)
    assert_alike(*runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_update_masters_as_torch_does(dtype: torch.dtype) -> None:
    # Half precision rounds a gradient differently where the last bit of a weight differs, so that
    # both get the same gradients.
    options = {"initial_loss_scale": 2.0**21, "hysteresis": 1, "loss_scale_window": 4}
    fused, plain = (
        Run(choice, dtype, clip_grad=0.05, **options) for choice in ("emulated", "torch")
    )
    skipped = []
    for step in range(STEPS):
        plain.accumulate(step)
        hand_on_gradients(plain.optimizer, fused.optimizer)
        skipped.append(fused.step())
        assert plain.step() == skipped[-1]
    assert any(skipped) == (dtype == torch.float16) and not all(skipped)
    assert fused.optimizer.state_dict() == plain.optimizer.state_dict()
    own, wanted = fused.everything(), plain.everything()
    for key in own:
        if key.startswith("optimizer."):
            assert torch.allclose(own[key], wanted[key], rtol=1e-5, atol=1e-8), key
    for parameter in fused.net.parameters():
        master = own[f"optimizer.master.{parameter.shard_spec.name}"]
        assert torch.equal(parameter.flatten(), master.to(dtype))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_bad_gradient_changes_nothing(poison: float, clip: float) -> None:
    run = Run("emulated", torch.bfloat16, clip_grad=clip)
    for step in range(3):
        run.accumulate(step)
        before = run.everything()
        if step != 1:
            run.net.norm_bias.main_grad[3] = poison
        assert run.step() == (step != 1)
        unchanged = all(torch.equal(t, before[key]) for key, t in run.everything().items())
        assert unchanged == (step != 1)
    assert run.optimizer.state_dict()["steps"] == 1


@pytest.mark.parametrize("choices", [("torch", "emulated"), ("emulated", "torch")])
def test_one_goes_on_from_the_others_checkpoint(choices: tuple[str, str]) -> None:
    first, through = (Run(choices[0]) for _ in range(2))
    second = Run(choices[1])
    for step in range(3):
        for run in (first, through):
            run.accumulate(step)
            run.step()
    second.take_over(first)
    for step in range(3, 6):
        for run in (second, through):
            run.accumulate(step)
            run.step()
    assert second.optimizer.state_dict()["steps"] == 6
    assert_alike(second, through)


@pytest.mark.parametrize(("shard_gradients", "clip"), [(False, 0.05), (True, 0.0)])
@distributed(2)
def test_sharded_kernels_train_as_torch_does(shard_gradients: bool, clip: float) -> None:
    state = ParallelState.create(Topology(2))
    mode = {
        "distributed": True,
        "shard_gradients": shard_gradients,
        "bucket_size": 100,
        "clip_grad": clip,
    }
    runs = [Run(choice, state=state, **mode) for choice in ("emulated", "torch")]
    for step in range(STEPS):
        for run in runs:
            run.accumulate(step, slice(state.data.rank, None, 2))
            assert not run.step()
    assert len(runs[0].optimizer.gradients.shards) > 2
    assert_alike(*runs)
    state.destroy()


def test_sgd_is_torchs_with_gradients_divided_by_the_kernel() -> None:
    runs = [Run(choice, optimizer="sgd", clip_grad=0.05) for choice in ("emulated", "torch")]
    for step in range(STEPS):
        for run in runs:
            run.accumulate(step)
            assert not run.step(lr=0.1)
    assert_alike(*runs)


class StandIn(torch.optim.Optimizer):
    """apex' FusedAdam as far as it is used: steps counted by the group, state made beforehand."""

    def __init__(self, groups: list[dict[str, Any]], *, adam_w_mode: bool, **options: Any) -> None:
        assert adam_w_mode
        super().__init__(groups, {"weight_decay": 0.0, **options})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            group["step"] += 1
            c1, c2 = (1 - beta ** group["step"] for beta in group["betas"])
            for p in group["params"]:
                m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                m.lerp_(p.grad, 1 - group["betas"][0])
                v.lerp_(p.grad.square(), 1 - group["betas"][1])
                direction = m / c1 / ((v / c2).sqrt() + group["eps"])
                p -= group["lr"] * (group["weight_decay"] * p + direction)


@pytest.fixture
def _apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for from apex is the stand-in, on the CPU, too."""
    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(FusedAdam=StandIn))
    monkeypatch.setattr("megatron.optimizer.optimizer.build_update", ApexAdam)


@pytest.mark.usefixtures("_apex")
def test_apex_trains_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"initial_loss_scale": 2.0**21, "hysteresis": 1, "clip_grad": 0.05}
    apex = Run("torch", torch.float16, **options)
    monkeypatch.undo()
    plain = Run("torch", torch.float16, **options)
    skipped = []
    for step in range(STEPS):
        plain.accumulate(step)
        hand_on_gradients(plain.optimizer, apex.optimizer)
        before = apex.everything()
        skipped.append(apex.step())
        assert plain.step() == skipped[-1]
        unchanged = all(torch.equal(t, before[key]) for key, t in apex.everything().items())
        assert unchanged == skipped[-1]
    assert any(skipped) and not all(skipped)
    assert apex.optimizer.state_dict() == plain.optimizer.state_dict()
    own, wanted = apex.everything(), plain.everything()
    for key in own:
        assert torch.allclose(own[key], wanted[key], rtol=1e-5, atol=1e-8), key


@pytest.mark.parametrize(
    ("choice", "dtype", "name", "kind"),
    [
        ("emulated", torch.float32, "adam", KernelAdamW),
        ("emulated", torch.float64, "adam", TorchUpdate),
        ("emulated", torch.float32, "sgd", TorchUpdate),
        ("auto", torch.float32, "adam", TorchUpdate),
    ],
)
def test_the_kernel_runs_where_it_can(
    choice: str, dtype: torch.dtype, name: str, kind: type
) -> None:
    with kernels.using(choice):
        optimizer = build_optimizer(make_config(optimizer=name), [Net(SINGLE, dtype)], SINGLE)
    assert isinstance(optimizer._update, kind)
