"""How the modules of a model come by their values, whatever ranks they are spread over.

A model is built without memory, on the meta device, and gets its values once, when all of its
modules exist: initial ones from `post_init`, those of files from `from_pretrained`. Either is a
function of the tensors' global names, so that every layout starts from the same model.

A larger model hands its own state, which has no memory yet, to the models inside it. That is how
these know that their values are none of their business.

Letters: h hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.checkpoint.hugging_face.models import model_config_of
from megatron.hf.configuration import BertFamilyConfig
from megatron.hf.gathering import Part, held_by_stages
from megatron.hf.parallel import native_config, stage_of
from megatron.mpu import ParallelState, ShardSpec
from megatron.mpu.init import InitMethod, create_parameter, normal, ones, zeros
from megatron.mpu.staging import staged
from megatron.mpu.watchdog import waiting

META = torch.device("meta")
WORD_EMBEDDINGS = "language_model.embedding.word_embeddings.weight"
# The ranks of the models that are built now, where they are not told.
_building: ContextVar[ParallelState | None] = ContextVar("_building", default=None)


class InitialisedModule(nn.Module):
    """A network that is built without memory and then given values.

    A subclass makes its modules in its constructor and calls `post_init` last. Parameters without
    a `shard_spec`, as those of PyTorch's own layers, are taken to be whole on all tensor ranks.

    Args:
        parallel_state: the ranks that the model is spread over; this process alone by default.

    Raises:
        ConfigError, CheckpointError: the configuration cannot be built; both are ValueErrors.
    """

    def __init__(
        self, config: BertFamilyConfig, *, parallel_state: ParallelState | None = None
    ) -> None:
        super().__init__()
        config.check()
        state = parallel_state or _building.get() or ParallelState.single()
        model = model_config_of(config.to_dict())
        self.config = config
        self._device = state.device
        # Modules of a model that is being built share its state, which has no memory yet.
        self.state = state if state.device == META else without_memory(state)
        self.stage = stage_of(model.num_layers, state)
        self.native_config = native_config(model, state)
        self.gradient_checkpointing = False
        self._initial_seed: int | None = None
        # Says where a stage is that has no parameter, and in which number format.
        self._format: Tensor
        self.register_buffer("_format", torch.empty(0, device=META), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the parameters."""
        return next(self.parameters(), self._format).dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters(), self._format).device

    def post_init(self) -> None:
        """Give the parameters their initial values; the last thing a constructor does.

        All ranks must call it. Within the constructor of a larger model, and of one that is loaded
        from files, it leaves the values to that.
        """
        for name, parameter in self.named_parameters():
            if not hasattr(parameter, "shard_spec"):
                parameter.shard_spec = ShardSpec(name, tuple(parameter.shape))  # type: ignore[attr-defined]
        self._held = held_by_stages(self.parts().values(), self.state)
        if self._device == META:
            return
        self.materialise(self._device, torch.get_default_dtype())
        self.seed_of_values()  # which all ranks agree on, also one that has nothing to draw
        for module in self.modules():
            self._init_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the initial values of a module's own parameters."""
        for parameter in module.parameters(recurse=False):
            self.init_parameter(parameter)

    @torch.no_grad()
    def init_parameter(self, parameter: nn.Parameter) -> None:
        """N(0, initializer_range) in matrices, zeros in biases, ones in norms' weights.

        Drawn from a seed that PyTorch's default generator, so `torch.manual_seed`, determines.
        """
        spec = spec_of(parameter)
        if not spec.shape:
            return  # a number of a user's own, which has its value
        method: InitMethod = zeros if spec.key.endswith("bias") else ones
        if len(spec.shape) > 1:
            method = normal(self.config.initializer_range, self.seed_of_values())
        fresh = create_parameter(
            spec, self.state.tensor, method, dtype=parameter.dtype, device=parameter.device
        )
        parameter.copy_(fresh)
        if spec.key == WORD_EMBEDDINGS and self.config.pads_with_zeros:
            self._row_of_padding(Part(spec, parameter)).zero_()

    def _row_of_padding(self, part: Part) -> Tensor:
        """[0 or 1, h]: the padding token's row, where this rank holds it."""
        axis, row = self.state.tensor, self.config.pad_token_id
        first = axis.rank * part.tensor.size(0)
        if row is None or not first <= row < first + part.tensor.size(0):
            return part.tensor[:0]
        return part.tensor[row - first : row - first + 1]

    def seed_of_values(self) -> int:
        """The seed of the initial values, the same on all ranks."""
        if self._initial_seed is None:
            seed = torch.randint(2**62, ()).to(self.state.device)
            if self.state.world_size > 1:
                what = "rank 0 to say the seed of initial values"
                with waiting(what), staged(seed, dist.group.WORLD) as exchanged:
                    dist.broadcast(exchanged, src=0)
            self._initial_seed = int(seed)
        return self._initial_seed

    def materialise(self, device: torch.device, dtype: torch.dtype) -> None:
        """Give every parameter memory, filled with zeros, where it has none."""
        for module in self.modules():
            if isinstance(module, InitialisedModule):
                module._format = torch.empty(0, dtype=dtype, device=device)
        for parameter in self.parameters():
            if parameter.is_meta:
                fresh = nn.Parameter(
                    torch.zeros(parameter.shape, dtype=dtype, device=device),
                    requires_grad=parameter.requires_grad,
                )
                fresh.shard_spec = spec_of(parameter)  # type: ignore[attr-defined]
                hooks = parameter._backward_hooks
                # It stays the same object, for whoever has it or has tied something to it.
                torch.utils.swap_tensors(parameter, fresh)
                parameter._backward_hooks = hooks
            else:
                parameter.data = parameter.data.to(device, dtype)
        object.__setattr__(self.state, "device", device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # What `to`, `cuda` and their like call: the random streams go where the parameters go.
        super()._apply(fn, recurse)
        object.__setattr__(self.state, "device", self.device)
        self.state.streams.to(self.device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for shared in (self.state, *vars(self.state).values()):
            memo[id(shared)] = shared
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        # PyTorch copies of a parameter its values alone.
        for own, copied in zip(self.parameters(), clone.parameters(), strict=True):
            copied.shard_spec = spec_of(own)  # type: ignore[attr-defined]
            copied._backward_hooks = copy.deepcopy(own._backward_hooks, memo)
        return clone

    def parts(self) -> dict[str, Part]:
        """This rank's parameters by the names of their values; of a copy the owner's."""
        return {
            spec_of(parameter).key: Part(spec_of(parameter), parameter)
            for parameter in self.parameters()
        }


def spec_of(parameter: Tensor) -> ShardSpec:
    spec = parameter.shard_spec  # type: ignore[attr-defined]
    assert isinstance(spec, ShardSpec)
    return spec


def without_memory(state: ParallelState) -> ParallelState:
    """The same ranks and streams, with parameters that have shapes and no values."""
    twin = replace(state, device=META)
    object.__setattr__(twin, "streams", state.streams)
    return twin


@contextmanager
def built_on(state: ParallelState) -> Iterator[None]:
    token = _building.set(state)
    try:
        yield
    finally:
        _building.reset(token)
