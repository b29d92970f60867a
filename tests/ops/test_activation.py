"""Every activation that a configuration may name, against its formula."""

import math

import pytest
import torch

from megatron.config.model import ACTIVATIONS as NAMES
from megatron.ops.activation import ACTIVATIONS


def normal_cdf(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


FORMULAS = {
    "gelu": lambda x: x * normal_cdf(x),
    "gelu_tanh": lambda x: (
        0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "gelu_10": lambda x: min(10.0, max(-10.0, x * normal_cdf(x))),
    "laplace": lambda x: normal_cdf((x - math.sqrt(0.5)) / 0.282095),
    "linear": lambda x: x,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "quick_gelu": lambda x: x / (1.0 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "sigmoid": lambda x: 1.0 / (1.0 + math.exp(-x)),
    "silu": lambda x: x / (1.0 + math.exp(-x)),
    "tanh": math.tanh,
}


def test_every_name_of_the_configuration_is_there() -> None:
    assert set(NAMES) == set(ACTIVATIONS) == set(FORMULAS)


@pytest.mark.parametrize("name", NAMES)
def test_an_activation_is_its_formula(name: str) -> None:
    x = torch.linspace(-14.0, 14.0, 113, dtype=torch.float64)
    expected = torch.tensor([FORMULAS[name](value) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), expected, rtol=1e-12, atol=1e-12)
