"""The ranks that a model of the family is spread over.

    state = parallel_state(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    model = MegatronBertForMaskedLM.from_pretrained(directory, parallel_state=state)

Ranks are those that torchrun started; one process needs neither torchrun nor a process group.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.errors import ConfigError
from megatron.mpu import ParallelState, Stage, Topology, stages


def parallel_state(
    tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1
) -> ParallelState:
    """The groups of a model that so many tensor and pipeline ranks share; all ranks must call it.

    Joins the ranks that torchrun started, where that has not been done. What more ranks there are
    hold replicas of the model.

    Raises:
        ConfigError: there are fewer ranks, or a number of them that is no multiple.
    """
    ranks = tensor_model_parallel_size * pipeline_model_parallel_size
    world = dist.get_world_size() if dist.is_initialized() else _launched()
    if world % ranks:
        raise ConfigError(
            f"tensor_model_parallel_size {tensor_model_parallel_size} x "
            f"pipeline_model_parallel_size {pipeline_model_parallel_size} needs a multiple of "
            f"{ranks} ranks and found {world}: start with torchrun --nproc-per-node {ranks}"
        )
    device = _device()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(
            dist.get_default_backend_for_device(device),
            device_id=None if device.type == "cpu" else device,
        )
    topology = Topology(world, tensor_model_parallel_size, pipeline_model_parallel_size)
    return ParallelState.create(topology, device=device)


def _launched() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _device() -> torch.device:
    """The accelerator of this rank's local number, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or _launched() == 1:
        # One process decides by model.to(device), as its user is used to.
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if dist.is_initialized() and dist.get_backend() == "gloo":  # over which ranks can share one
        index %= torch.accelerator.device_count()
    device = torch.device(accelerator.type, index)
    torch.accelerator.set_device_index(device.index)
    return device


def stage_of(num_layers: int, state: ParallelState) -> Stage:
    """This rank's stage of a model whose layers are shared out as equally as can be."""
    return stages(_layers_per_stage(num_layers, state.pipeline.size))[state.pipeline.rank]


def _layers_per_stage(num_layers: int, count: int) -> tuple[int, ...]:
    each, more = divmod(num_layers, count)
    return tuple(each + (stage < more) for stage in range(count))


def native_config(model: ModelConfig, state: ParallelState) -> Config:
    """The configuration that the layers of the model are built from on these ranks.

    The vocabulary is padded no further than the tensor ranks need.

    Raises:
        ConfigError: something that is split over the tensor ranks is not divisible by them.
    """
    size = state.tensor.size
    split = {"num_attention_heads": model.num_attention_heads, "intermediate_size": model.ffn_size}
    problems = [
        f"{name} {value} is not divisible by tensor_model_parallel_size {size}"
        for name, value in split.items()
        if value % size
    ]
    if problems:
        raise ConfigError(problems)
    parallel = ParallelConfig(
        tensor_model_parallel_size=size,
        pipeline_model_parallel_size=state.pipeline.size,
        pipeline_layers=_layers_per_stage(model.num_layers, state.pipeline.size),
    )
    return Config(
        model=replace(model, make_vocab_size_divisible_by=1),
        parallel=parallel,
        optimizer=OptimizerConfig(lr=0.0),
        data=DataConfig(seq_length=model.max_position_embeddings),
        train=TrainConfig(micro_batch_size=1),
    )
