"""Fused AdamW: kernel and twin against torch's AdamW in float64."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from megatron.ops import kernels
from megatron.ops.adamw import adamw_
from tests.ops.kernel_cases import DEVICE, ON_GPU, relative_error, with_kernels

LR, BETAS, EPS, DECAY = 0.01, (0.9, 0.999), 1e-8, 0.1
# Formats of the parameters; where they are float32 the weights are the parameters.
PARAMETERS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (5, 4099, 1024, 1, 0, 12_288)


@dataclass
class Case:
    """Weights in three formats of parameters, with what AdamW keeps of them."""

    weights: list[Tensor]
    rounded: list[Tensor | None]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    decays: list[float]
    step: Tensor

    @classmethod
    def of(cls, *sizes: int, offset: int = 0, dtype: torch.dtype = torch.float32) -> Case:
        generator = torch.Generator().manual_seed(3)

        def flat(size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(size + offset, dtype=dtype, device=DEVICE)[offset:]

        weights = [flat(size) for size in sizes]
        for each in weights:
            each.copy_(torch.randn(each.shape, generator=generator))
        formats = [PARAMETERS[i % 3] for i in range(len(sizes))]
        return cls(
            weights,
            [
                None if low == torch.float32 else flat(w.numel(), low).copy_(w)
                for w, low in zip(weights, formats, strict=True)
            ],
            [flat(size) for size in sizes],
            [flat(size) for size in sizes],
            [DECAY * (i % 2) for i in range(len(sizes))],
            torch.zeros((), dtype=dtype, device=DEVICE),
        )

    def update(
        self,
        gradients: list[Tensor],
        *,
        lr: float = LR,
        betas: tuple[float, float] = BETAS,
        skip: bool = False,
        divisor: float | None = None,
    ) -> None:
        adamw_(
            *(self.weights, self.rounded, gradients, self.exp_avgs, self.exp_avg_sqs, self.decays),
            step=self.step,
            skipped=torch.tensor(skip, device=DEVICE),
            divisor=None if divisor is None else torch.full_like(self.step, divisor),
            lr=lr,
            betas=betas,
            eps=EPS,
        )

    def everything(self) -> list[Tensor]:
        rounded = [low for low in self.rounded if low is not None]
        return [*self.weights, *rounded, *self.exp_avgs, *self.exp_avg_sqs, self.step]


class Reference:
    """torch's own AdamW, in `dtype` on the CPU."""

    def __init__(self, case: Case, dtype: torch.dtype, betas: tuple[float, float] = BETAS) -> None:
        self.weights = [w.detach().cpu().to(dtype).requires_grad_() for w in case.weights]
        groups = [
            {"params": [w], "weight_decay": decay}
            for w, decay in zip(self.weights, case.decays, strict=True)
        ]
        fused = dtype == torch.float32
        self.adamw = torch.optim.AdamW(groups, lr=LR, betas=betas, eps=EPS, fused=fused)

    def update(self, gradients: list[Tensor], lr: float = LR, divisor: float | None = None) -> None:
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient.cpu().to(weight.dtype) / (divisor or 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()

    def state(self, name: str) -> list[Tensor]:
        return [self.adamw.state[weight][name] for weight in self.weights]


def gradients_of(case: Case, step: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [
        (torch.randn(w.shape, generator=generator) * size).to(w.device, w.dtype)
        for w in case.weights
    ]


def assert_agrees(case: Case, reference: Reference, tolerance: float) -> None:
    for own, wanted in (
        (case.weights, [w.detach() for w in reference.weights]),
        (case.exp_avgs, reference.state("exp_avg")),
        (case.exp_avg_sqs, reference.state("exp_avg_sq")),
    ):
        for one, other in zip(own, wanted, strict=True):
            assert relative_error(one.cpu(), other) <= tolerance


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("betas", [BETAS, (0.0, 0.0), (0.6, 0.3)])
def test_kernel_follows_adamw_over_many_steps(betas: tuple[float, float], offset: int) -> None:
    case = Case.of(*SIZES, offset=offset)
    reference = Reference(case, torch.float64, betas)
    good = 0
    for step in range(20):
        divisor = (None, 1.7, 1024.0)[step % 3]
        gradients = gradients_of(case, step, divisor or 1.0)
        lr = LR * (step + 1) / 20
        skip = step in (0, 7)
        with with_kernels():
            case.update(gradients, lr=lr, betas=betas, skip=skip, divisor=divisor)
        if not skip:
            reference.update(gradients, lr, divisor)
            good += 1
        assert case.step.item() == good
    assert_agrees(case, reference, 1e-6)
    for weights, rounded in zip(case.weights, case.rounded, strict=True):
        if rounded is not None:
            assert torch.equal(rounded, weights.to(rounded.dtype))


def test_kernel_takes_aligned_shards_and_more_than_one_launch_holds() -> None:
    case = Case.of(*[1024, 4096, 5120] * 70)
    reference = Reference(case, torch.float64)
    for step in range(2):
        gradients = gradients_of(case, step)
        with with_kernels():
            case.update(gradients)
        reference.update(gradients)
    assert_agrees(case, reference, 1e-6)


def test_twin_follows_adamw_over_many_steps() -> None:
    case = Case.of(*SIZES, dtype=torch.float64)
    reference = Reference(case, torch.float64)
    with kernels.using("torch", DEVICE):
        for step in range(20):
            gradients = gradients_of(case, step)
            case.update(gradients, skip=step == 3, divisor=1.7)
            if step != 3:
                reference.update(gradients, divisor=1.7)
    assert_agrees(case, reference, 1e-13)


def test_kernel_is_as_exact_as_torchs_own() -> None:
    case = Case.of(300)
    exact, fused = Reference(case, torch.float64), Reference(case, torch.float32)
    for step in range(200):
        # A mean that its gradients have long pulled away from zero shows errors of beta best.
        gradients = [gradient + 1.0 for gradient in gradients_of(case, step)]
        with with_kernels():
            case.update(gradients)
        exact.update(gradients)
        fused.update(gradients)
    for own, torchs, wanted in (
        (case.weights[0], fused.weights[0], exact.weights[0]),
        (case.exp_avg_sqs[0], fused.state("exp_avg_sq")[0], exact.state("exp_avg_sq")[0]),
    ):
        wanted = wanted.detach()
        assert relative_error(own.cpu(), wanted) <= relative_error(torchs.detach(), wanted)


@pytest.mark.parametrize("choice", ["kernel", "torch"])
def test_a_skipped_step_changes_nothing(choice: str) -> None:
    case = Case.of(*SIZES)
    with with_kernels() if choice == "kernel" else kernels.using("torch", DEVICE):
        case.update(gradients_of(case, 0))
        before = [tensor.clone() for tensor in case.everything()]
        poisoned = [torch.full_like(weights, nan) for weights in case.weights]
        case.update(poisoned, skip=True, divisor=nan)
    assert all(torch.equal(*pair) for pair in zip(before, case.everything(), strict=True))


def test_neighbours_are_left_alone() -> None:
    case = Case.of(4500, 4500)
    whole = [[tensor.clone() for tensor in part] for part in (case.weights, case.exp_avgs)]
    inner = Case(
        [w[3:4400] for w in case.weights],
        [None if low is None else low[3:4400] for low in case.rounded],
        [m[3:4400] for m in case.exp_avgs],
        [v[3:4400] for v in case.exp_avg_sqs],
        case.decays,
        case.step,
    )
    with with_kernels():
        inner.update([g[3:4400] for g in gradients_of(case, 0)])
    for before, after in zip(whole, (case.weights, case.exp_avgs), strict=True):
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one[:3], other[:3]) and torch.equal(one[4400:], other[4400:])
            assert (one[3:4400] != other[3:4400]).all()


@pytest.mark.skipif(ON_GPU, reason="the order in which threads run is the emulator's")
def test_update_does_not_depend_on_the_order_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in "005":
        monkeypatch.setenv("MEGATRON_EMULATOR_SEED", seed)
        case = Case.of(*SIZES)
        with with_kernels():
            case.update(gradients_of(case, 0))
        found.append(case.everything())
    assert all(
        torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True)
    )


@pytest.mark.parametrize("choice", ["torch", "emulated"])
def test_is_an_operator(choice: str) -> None:
    w, g, m, v = (torch.rand(6) for _ in range(4))
    arguments = (
        *(torch.tensor(3.0), torch.tensor(False), torch.tensor(2.0)),
        *([w], [w.to(torch.bfloat16)], [g], [m], [v], [DECAY], LR, *BETAS, EPS),
    )
    with kernels.using(choice):
        opcheck(torch.ops.megatron.adamw_.default, arguments)
