"""The initial values of the networks' weights."""

from __future__ import annotations

import math

from megatron.config import Config
from megatron.mpu.init import InitMethod, normal, xavier_uniform


def init_method_normal(sigma: float, seed: int = 1234) -> InitMethod:
    """N(0, sigma**2)."""
    return normal(sigma, seed)


def scaled_init_method_normal(sigma: float, num_layers: int, seed: int = 1234) -> InitMethod:
    """N(0, sigma**2 / (2 * num_layers)), for the products that end in the residual stream.

    The stream adds up two of them per layer; so scaled, their sum keeps the variance of one
    (arXiv 1909.08053, section 4.1).
    """
    return normal(sigma / math.sqrt(2.0 * num_layers), seed)


def init_methods(config: Config) -> tuple[InitMethod, InitMethod]:
    """The initial values of matrices in general, and of those that end in the residual stream."""
    model, seed = config.model, config.train.seed
    if model.init_method_xavier_uniform:
        return xavier_uniform(seed), xavier_uniform(seed)
    std = model.init_method_std
    return (
        init_method_normal(std, seed),
        scaled_init_method_normal(std, model.num_layers, seed),
    )
