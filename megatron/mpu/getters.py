"""The one installed :class:`ParallelState`, read through the field's customary functions.

The project itself passes the state explicitly; these functions are for code written against the
Megatron interface.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.mpu.parallel_state import DEFAULT_TIMEOUT, Axis, ParallelState
from megatron.mpu.topology import Topology

_installed: ParallelState | None = None


def install(state: ParallelState) -> ParallelState:
    """Make ``state`` the one that the getters read, and return it."""
    global _installed
    _installed = state
    return state


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    *,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> ParallelState:
    """Create this rank's groups and install them; every rank of the world must call it.

    Raises:
        ValueError: the world size is not divisible by the two sizes.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    topology = Topology(world, tensor_model_parallel_size, pipeline_model_parallel_size)
    return install(ParallelState.create(topology, device=device, backend=backend, timeout=timeout))


def destroy_model_parallel() -> None:
    """Release the installed groups; afterwards there are none."""
    global _installed
    if _installed is not None:
        _installed.destroy()
    _installed = None


def model_parallel_is_initialized() -> bool:
    """Whether a state is installed."""
    return _installed is not None


def get_parallel_state() -> ParallelState:
    """The installed state; raises RuntimeError where there is none."""
    if _installed is None:
        raise RuntimeError("model parallelism is not initialised: call initialize_model_parallel")
    return _installed


def _group(axis: Axis | None, name: str) -> dist.ProcessGroup:
    if axis is None:
        raise RuntimeError(f"rank {get_parallel_state().rank} is not in the {name} group")
    if axis.group is None:
        raise RuntimeError(f"the {name} axis has a single rank and therefore no group")
    return axis.group


def get_tensor_model_parallel_group() -> dist.ProcessGroup:
    """The group of this rank's tensor axis; raises RuntimeError where its size is 1."""
    return _group(get_parallel_state().tensor, "tensor")


def get_tensor_model_parallel_rank() -> int:
    """This rank's place on the tensor axis."""
    return get_parallel_state().tensor.rank


def get_tensor_model_parallel_world_size() -> int:
    """Size of the tensor axis."""
    return get_parallel_state().tensor.size


def get_pipeline_model_parallel_group() -> dist.ProcessGroup:
    """The group of this rank's pipeline axis; raises RuntimeError where its size is 1."""
    return _group(get_parallel_state().pipeline, "pipeline")


def get_pipeline_model_parallel_rank() -> int:
    """This rank's place on the pipeline axis."""
    return get_parallel_state().pipeline.rank


def get_pipeline_model_parallel_world_size() -> int:
    """Size of the pipeline axis."""
    return get_parallel_state().pipeline.size


def get_data_parallel_group() -> dist.ProcessGroup:
    """The group of this rank's data axis; raises RuntimeError where its size is 1."""
    return _group(get_parallel_state().data, "data")


def get_data_parallel_rank() -> int:
    """This rank's place on the data axis."""
    return get_parallel_state().data.rank


def get_data_parallel_world_size() -> int:
    """Size of the data axis."""
    return get_parallel_state().data.size


def get_embedding_group() -> dist.ProcessGroup:
    """First and last stage; raises RuntimeError on other ranks and with a single stage."""
    return _group(get_parallel_state().embedding, "embedding")


def get_position_embedding_group() -> dist.ProcessGroup:
    """Stages that hold position embeddings; raises RuntimeError where fewer than two do."""
    return _group(get_parallel_state().position_embedding, "position embedding")


def is_rank_in_embedding_group() -> bool:
    """Whether this rank's stage holds a copy of the word embedding."""
    return get_parallel_state().embedding is not None


def is_rank_in_position_embedding_group() -> bool:
    """Whether this rank's stage holds a copy of the position embedding."""
    return get_parallel_state().position_embedding is not None


def is_pipeline_first_stage(ignore_virtual: bool = False) -> bool:
    """Whether this rank is the first of its pipeline.

    ``ignore_virtual`` makes no difference while each rank holds a single stage.
    """
    return get_parallel_state().pipeline.rank == 0


def is_pipeline_last_stage(ignore_virtual: bool = False) -> bool:
    """Whether this rank is the last of its pipeline; see :func:`is_pipeline_first_stage`."""
    pipeline = get_parallel_state().pipeline
    return pipeline.rank == pipeline.size - 1
