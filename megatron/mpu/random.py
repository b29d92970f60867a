"""Random numbers of dropout, as a pure function of where and when they are drawn.

Two streams exist on every rank. The *common* one is the same on all tensor ranks: they all hold
the residual stream, and must drop the same elements of it. The *split* one differs between them:
each holds other attention heads, whose dropout must be independent.

:meth:`RandomStreams.start` seeds both from (seed, step, micro-batch, chunk, stage, data rank
[, tensor rank]) before each forward pass. Nothing has to be saved to resume a run bitwise, and a
forward pass can be repeated at any time, in any order, with the same numbers.

Each stream runs twice: as the state of the device's generator, from which PyTorch's operators draw
one number after the other, and as a key with a count of its draws (:meth:`RandomStreams.draw`),
from which the kernels find the number of any element.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron.mpu.topology import Coordinates
from megatron.ops.philox import Draw

# The devices whose numbers the host's generator draws; a run that is only planned draws none.
_BY_HOST = ("cpu", "meta")


def stream_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all of ``parts``; equal parts give equal seeds everywhere."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass
class _Key:
    """The key of a stream's counter-based draws, and its tensor once it was asked for."""

    value: int
    tensor: torch.Tensor | None = None


class _Count(NamedTuple):
    """How many draws a key has made; there is none before the first start."""

    key: _Key | None = None
    number: int = 0


class Snapshot(NamedTuple):
    """Where both streams stand."""

    common: torch.Tensor
    split_state: torch.Tensor | None
    split_seed: int | None
    common_draws: _Count
    split_draws: _Count


class RandomStreams:
    """The common and the split stream of one rank.

    The common stream is the device's default generator, so that every ordinary dropout uses it;
    inside :meth:`split_region` the default generator runs the split stream instead.

    Attributes:
        static_keys: i64[1] each, the keys of the common and of the split stream's draws, for a
            recorded graph that reads them at fixed addresses: while they are set, :meth:`start`
            writes into them rather than making tensors. Whoever sets them sees to it that a
            backward pass comes before the next start that would overwrite its keys.
    """

    def __init__(self, coordinates: Coordinates, tensor_size: int, device: torch.device) -> None:
        self._coordinates = coordinates
        self._tensor_size = tensor_size
        self._device = device
        self._split_state: torch.Tensor | None = None
        self._split_seed: int | None = None
        self._common_draws, self._split_draws = _Count(), _Count()
        self._is_split = False
        self.static_keys: tuple[torch.Tensor, torch.Tensor] | None = None

    def to(self, device: torch.device) -> None:
        """Draw on another device from the next `start` on."""
        self._device, self._split_state = device, None
        self._common_draws, self._split_draws = _Count(), _Count()

    def start(self, seed: int, step: int, micro_batch: int, chunk: int = 0) -> None:
        """Seed both streams for one forward pass of one micro-batch."""
        place = self._coordinates
        common = (seed, step, micro_batch, chunk, place.pipeline, place.data)
        self._seed_default(stream_seed("common", *common))
        self._split_state = None
        self._split_seed = stream_seed("split", *common, place.tensor)
        # Not the generators' seeds: theirs is the same function, of counters that would overlap.
        keys = (
            _Key(stream_seed("common key", *common)),
            _Key(stream_seed("split key", *common, place.tensor)),
        )
        self._common_draws, self._split_draws = map(_Count, keys)
        if self.static_keys is not None:
            for key, tensor in zip(keys, self.static_keys, strict=True):
                key.tensor = tensor.fill_(key.value)

    def draw(self) -> Draw:
        """The next counter-based draw of the stream that is drawn from here; waits for nothing.

        Without a start the key itself is drawn, from the generator, as its user is used to.
        """
        key, number = self._split_draws if self._is_split else self._common_draws
        if key is None:
            return Draw(torch.randint(2**63 - 1, (1,), device=self._device), 0)
        if self._is_split:
            self._split_draws = _Count(key, number + 1)
        else:
            self._common_draws = _Count(key, number + 1)
        if key.tensor is None:
            key.tensor = torch.full((1,), key.value, dtype=torch.int64, device=self._device)
        return Draw(key.tensor, number)

    def snapshot(self) -> Snapshot:
        """Where the streams stand, to draw the same numbers again from there."""
        return Snapshot(
            self._get_state(),
            self._split_state,
            self._split_seed,
            self._common_draws,
            self._split_draws,
        )

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
        self._common_draws, self._split_draws = snapshot.common_draws, snapshot.split_draws

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
        self._is_split = True
        try:
            yield
        finally:
            self._is_split = False
            self._split_state = self._get_state()
            self._set_state(common)

    def _seed_default(self, seed: int) -> None:
        if self._device.type in _BY_HOST:
            torch.default_generator.manual_seed(seed)
        else:
            torch.get_device_module(self._device).manual_seed(seed)

    def _get_state(self) -> torch.Tensor:
        if self._device.type in _BY_HOST:
            return torch.get_rng_state()
        return torch.get_device_module(self._device).get_rng_state(self._device)

    def _set_state(self, state: torch.Tensor) -> None:
        if self._device.type in _BY_HOST:
            torch.set_rng_state(state)
        else:
            torch.get_device_module(self._device).set_rng_state(state, self._device)
