from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.optimizer.loss_scaler import (
    ConstantLossScaler,
    DynamicLossScaler,
    build_loss_scaler,
)
from tests.optimizer.support import make_config


@dataclass
class Model:
    """The rule in plain Python."""

    scale: float
    minimum: float
    window: int
    hysteresis: int

    def __post_init__(self) -> None:
        self.good_steps = 0
        self.tolerance = self.hysteresis

    def update(self, overflow: bool) -> None:
        if overflow:
            self.good_steps = 0
            self.tolerance -= 1
            if self.tolerance <= 0:
                self.scale = max(self.scale / 2, self.minimum)
            return
        self.good_steps += 1
        if self.good_steps == self.window:
            self.good_steps = 0
            self.tolerance = self.hysteresis
            self.scale *= 2


def make_scaler(initial: float, window: int, hysteresis: int) -> DynamicLossScaler:
    return DynamicLossScaler(
        initial=initial, minimum=1.0, window=window, hysteresis=hysteresis, device="cpu"
    )


@given(
    st.lists(st.booleans(), max_size=60),
    st.integers(0, 12),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 60),
)
def test_follows_the_plain_model(
    overflows: list[bool], exponent: int, window: int, hysteresis: int, saved_at: int
) -> None:
    scaler = make_scaler(2.0**exponent, window, hysteresis)
    model = Model(2.0**exponent, 1.0, window, hysteresis)
    for index, overflow in enumerate(overflows):
        if index == saved_at:
            saved, scaler = scaler.state_dict(), make_scaler(3.0, window, hysteresis)
            scaler.load_state_dict(saved)
        scaler.update(torch.tensor(overflow))
        model.update(overflow)
        assert scaler.scale.item() == model.scale


def test_scale_is_one_tensor_for_life() -> None:
    scaler = make_scaler(4.0, 1, 1)
    scale = scaler.scale
    scaler.update(torch.tensor(False))
    assert scaler.scale is scale
    assert scale.item() == 8.0


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_constant_where_one_is_given(precision: str) -> None:
    config = make_config(fp16=precision == "fp16", bf16=precision == "bf16", loss_scale=128.0)
    scaler = build_loss_scaler(config, "cpu")
    scaler.update(torch.tensor(True))
    assert isinstance(scaler, ConstantLossScaler)
    assert scaler.scale.item() == 128.0


def test_fp16_scales_dynamically_and_others_do_not() -> None:
    assert build_loss_scaler(make_config(fp16=True), "cpu").scale.item() == 2.0**32
    assert build_loss_scaler(make_config(bf16=True), "cpu").scale.item() == 1.0
    assert build_loss_scaler(make_config(), "cpu").scale.item() == 1.0


def test_switching_from_constant_starts_at_the_initial_scale() -> None:
    scaler = make_scaler(16.0, 2, 2)
    scaler.load_state_dict(ConstantLossScaler(8.0, "cpu").state_dict())
    assert scaler.scale.item() == 16.0
