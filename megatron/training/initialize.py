"""From a fresh process to its place among the ranks: device, process groups, watchdog, seeds."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.mpu import ParallelState, Topology, install
from megatron.mpu.watchdog import group_timeout, start_watchdog, stop_watchdog
from megatron.ops import compiled, kernels

_PR_SET_PDEATHSIG = 1  # in Linux' sys/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # in glibc's malloc.h
_INT_MAX = 2**31 - 1


def world_size() -> int:
    """The number of ranks that the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_rank() -> int:
    """This process's rank; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def choose_device(config: Config) -> torch.device:
    """This rank's device: the accelerator of its local number, or the CPU.

    Over gloo, which can do it, ranks beyond the number of accelerators share these. Raises
    ConfigError where the backend does not fit the device, or --cuda-graphs has none.
    """
    backend = config.parallel.distributed_backend
    if config.parallel.use_cpu or not torch.accelerator.is_available():
        if backend == "nccl":
            raise ConfigError("--distributed-backend nccl needs a GPU; leave it out on a CPU")
        device = torch.device("cpu")
    else:
        device = _own_accelerator(backend)
    if config.train.cuda_graphs and device.type != "cuda":
        raise ConfigError(f"--cuda-graphs needs a GPU, the run is on {device.type}")
    return device


def _own_accelerator(backend: str | None) -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    count, local_rank = torch.accelerator.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= count and backend != "gloo":
        raise ConfigError(
            f"{count} {accelerator.type} devices are here, and torchrun started a rank "
            f"{local_rank} for one more: lower --nproc-per-node, or have them share a device "
            "with --distributed-backend gloo"
        )
    return torch.device(accelerator.type, local_rank % count)


def rank_grid(config: Config, world_size: int) -> Topology:
    """The grid on which the configuration puts so many ranks."""
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    has_split = config.model.model_type == "t5" and pipeline > 1
    split = parallel.split_rank() if has_split else None
    return Topology(world_size, tensor, pipeline, split)


def initialize(config: Config) -> ParallelState:
    """Joins the ranks that torchrun started, by its environment variables, or is the only rank.

    Without torchrun there is no process group at all.
    """
    _die_with_the_launcher()
    device = choose_device(config)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        let_segments_expand(device)
        torch.accelerator.set_device_index(device.index)
    parallel, world = config.parallel, world_size()
    limit = timedelta(minutes=parallel.distributed_timeout_minutes)
    timeout = group_timeout(limit)
    if world > 1 and not dist.is_initialized():
        backend = parallel.distributed_backend or dist.get_default_backend_for_device(device)
        on_device = None if device.type == "cpu" or backend == "gloo" else device
        dist.init_process_group(backend, timeout=timeout, device_id=on_device)
        start_watchdog(own_rank(), limit, device)
    kernels.choose(config.train.kernels, device)
    compiled.choose(config.train.compile, device)
    state = install(ParallelState.create(rank_grid(config, world), device=device, timeout=timeout))
    _seed_everything(config.train.seed)
    return state


def _die_with_the_launcher() -> None:
    """Has the operating system end this rank when torchrun is killed.

    torchrun gives each rank a session of its own, so that ranks would outlive it and go on writing
    checkpoints beside the run that is started in its place. A rank that comes here later than
    that cannot join the others, since the store that they meet at was torchrun's.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_freed_memory() -> None:
    """Has the C library keep large blocks that are freed, as PyTorch does on a GPU.

    By default glibc gives each activation back to the system and takes it again in the next step,
    which then fills every page of it with zeros. Elsewhere nothing happens.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_M_TRIM_THRESHOLD, _INT_MAX)


def let_segments_expand(device: torch.device) -> None:
    """Has PyTorch's allocator map memory into segments that grow, unless the user has set it up.

    Blocks of many sizes then leave no gaps that nothing fits into. To be called before the device
    is first used; elsewhere than on an NVIDIA GPU nothing happens.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return
    if any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        return
    # PyTorch reads the variables as it is loaded; what has changed its name takes settings later.
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (change or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def _seed_everything(seed: int) -> None:
    """Seeds the global generators.

    Training itself draws from streams that are functions of the seed and the step; this is for
    code that a user may add.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def finalize(state: ParallelState) -> None:
    """Leaves the process groups, unwatched: the others may take their time to end."""
    stop_watchdog()
    if dist.is_initialized():
        state.destroy()
        dist.destroy_process_group()
