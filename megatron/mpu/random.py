"""Random numbers of dropout, as a pure function of where and when they are drawn.

Two streams exist on every rank. The *common* one is the same on all tensor ranks: they all hold
the residual stream, and must drop the same elements of it. The *split* one differs between them:
each holds other attention heads, whose dropout must be independent.

:meth:`RandomStreams.start` seeds both from (seed, step, micro-batch, chunk, stage, data rank
[, tensor rank]) before each forward pass. Nothing has to be saved to resume a run bitwise, and a
forward pass can be repeated at any time, in any order, with the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from megatron.mpu.topology import Coordinates


def stream_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all of ``parts``; equal parts give equal seeds everywhere."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class Snapshot(NamedTuple):
    """Where both streams stand."""

    common: torch.Tensor
    split_state: torch.Tensor | None
    split_seed: int | None


class RandomStreams:
    """The common and the split stream of one rank.

    The common stream is the device's default generator, so that every ordinary dropout uses it;
    inside :meth:`split_region` the default generator runs the split stream instead.
    """

    def __init__(self, coordinates: Coordinates, tensor_size: int, device: torch.device) -> None:
        self._coordinates = coordinates
        self._tensor_size = tensor_size
        self._device = device
        self._split_state: torch.Tensor | None = None
        self._split_seed: int | None = None

    def to(self, device: torch.device) -> None:
        """Draw on another device from the next `start` on."""
        self._device, self._split_state = device, None

    def start(self, seed: int, step: int, micro_batch: int, chunk: int = 0) -> None:
        """Seed both streams for one forward pass of one micro-batch."""
        place = self._coordinates
        common = (seed, step, micro_batch, chunk, place.pipeline, place.data)
        self._seed_default(stream_seed("common", *common))
        self._split_state = None
        self._split_seed = stream_seed("split", *common, place.tensor)

    def snapshot(self) -> Snapshot:
        """Where the streams stand, to draw the same numbers again from there."""
        return Snapshot(self._get_state(), self._split_state, self._split_seed)

    @contextmanager
    def replayed(self, snapshot: Snapshot) -> Iterator[None]:
        """Draw again what was drawn since ``snapshot``; then the streams go on as before."""
        before = self.snapshot()
        self._restore(snapshot)
        try:
            yield
        finally:
            self._restore(before)

    def _restore(self, snapshot: Snapshot) -> None:
        self._set_state(snapshot.common)
        self._split_state, self._split_seed = snapshot.split_state, snapshot.split_seed

    @contextmanager
    def split_region(self) -> Iterator[None]:
        """Draw from the split stream; with a single tensor rank there is only the common one."""
        if self._tensor_size == 1:
            yield
            return
        common = self._get_state()
        if self._split_state is not None:
            self._set_state(self._split_state)
        elif self._split_seed is not None:
            self._seed_default(self._split_seed)
        else:
            place = self._coordinates
            self._seed_default(stream_seed("split", torch.initial_seed(), place.tensor))
        try:
            yield
        finally:
            self._split_state = self._get_state()
            self._set_state(common)

    def _seed_default(self, seed: int) -> None:
        if self._device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.get_device_module(self._device).manual_seed(seed)

    def _get_state(self) -> torch.Tensor:
        if self._device.type == "cpu":
            return torch.get_rng_state()
        return torch.get_device_module(self._device).get_rng_state(self._device)

    def _set_state(self, state: torch.Tensor) -> None:
        if self._device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(self._device).set_rng_state(state, self._device)
