"""The states of this process' random-number generators, as tensors.

Training draws its randomness from (seed, step, micro-batch, ...) and needs none of these. They are
kept for code that draws from the global generators, and restored on the layout that saved them.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch


def collect(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of Python's, NumPy's and torch's generators, and of `device`'s own."""
    _, words, normal = random.getstate()
    numpy_state = np.random.get_state(legacy=True)
    assert isinstance(numpy_state, tuple)
    _, numpy_words, *rest = numpy_state
    # A float64 holds 32-bit words exactly, and the normal variate that a generator keeps for later.
    states = {
        "python": torch.tensor(
            [*words, math.nan if normal is None else normal], dtype=torch.double
        ),
        "numpy": torch.tensor([*numpy_words, *rest], dtype=torch.double),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def restore(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set the generators to what `collect` returned on the same kind of device."""
    *words, normal = states["python"].tolist()
    random.setstate((3, tuple(map(int, words)), None if math.isnan(normal) else normal))
    *numpy_words, position, has_normal, numpy_normal = states["numpy"].tolist()
    keys = np.array(numpy_words, dtype=np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_normal), numpy_normal))
    torch.set_rng_state(states["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)
