"""megatron-core with its local transformer layers, on the CPU over gloo.

Its model, its data-parallel wrapper and its pipeline schedules, with PyTorch's fused AdamW, since
its own optimizers are for GPUs. It asks for a CUDA device by name in several places; those get the
CPU (:func:`_without_cuda`).

Its package is called `megatron`, as this project's. This module takes the project's root from the
search path, and so must be the first in its process to import either.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.peers import AbsentError
from benchmarks.peers.sizes import EPSILON, Sizes
from benchmarks.peers.updates import Update

_NAMES = {
    "embedding.word_embeddings": "words",
    "output_layer": "words",
    "embedding.position_embeddings": "positions",
    "self_attention.linear_qkv": "qkv",
    "self_attention.linear_proj": "projection",
    "mlp.linear_fc1": "up",
    "mlp.linear_fc2": "down",
}


def build(sizes: Sizes, layout: str) -> Callable[[], float]:
    """A step of the layout; every process of it must build one."""
    core = _import()
    tensor, pipeline = (2 if layout in names else 1 for names in (("tp", "tp-sp"), ("pp",)))
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    core.parallel_state.initialize_model_parallel(tensor, pipeline)
    model = _model(core, sizes, layout, tensor, pipeline)
    update = Update(
        model.parameters(),
        group=core.parallel_state.get_model_parallel_group(),
        counted=partial(_counted, first=core.parallel_state.get_tensor_model_parallel_rank() == 0),
    )
    run = core.schedules.get_forward_backward_func()
    data = core.parallel_state.get_data_parallel_group()
    count = sizes.micro_batches if layout == "pp" else 1
    batches = cycle(
        [tokens.chunk(data.size())[data.rank()].chunk(count) for tokens in sizes.batches()]
    )

    def step() -> float:
        model.zero_grad_buffer()  # type: ignore[operator]
        losses = run(
            forward_step_func=_forward,
            data_iterator=iter(next(batches)),
            model=[model],
            num_microbatches=count,
            seq_length=sizes.sequence,
            micro_batch_size=sizes.batch // data.size() // count,
            forward_only=False,
        )
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad  # type: ignore[attr-defined]
        update()
        if not losses:
            return float("nan")
        total = torch.stack([each["loss"] for each in losses]).mean()
        dist.all_reduce(total, group=data)
        return total.item() / data.size()

    return step


def _import() -> ModuleType:
    """megatron-core's parts as attributes of one module; raises AbsentError."""
    root = Path(__file__).resolve().parents[2]
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != root]
    logging.disable(logging.WARNING)
    core = ModuleType("core")
    parts = {
        "parallel_state": "parallel_state",
        "random": "tensor_parallel.random",
        "schedules": "pipeline_parallel.schedules",
        "finalize": "distributed.finalize_model_grads",
        "distributed": "distributed",
        "specs": "models.gpt.gpt_layer_specs",
        "gpt": "models.gpt",
        "transformer": "transformer.transformer_config",
        "norms": "transformer.torch_norm",
    }
    try:
        for name, path in parts.items():
            setattr(core, name, importlib.import_module(f"megatron.core.{path}"))
    except ImportError as error:
        raise AbsentError(f"megatron-core does not import: {error}") from error
    _without_cuda(core)
    return core


def _without_cuda(core: ModuleType) -> None:
    """Give the CPU where a CUDA device is asked for; there is no dropout, hence no random state."""

    class _Torch(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def zeros(*args: Any, **options: Any) -> Tensor:
            return torch.zeros(*args, **options | {"device": "cpu"})

    core.schedules.torch = _Torch("torch")
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = _unmoved  # type: ignore[assignment, method-assign]
    core.random.CudaRNGStatesTracker.fork = lambda *_: nullcontext()
    core.norms.WrappedTorchNorm.__new__ = _norm


def _unmoved(tensor: Tensor) -> Tensor:
    return tensor


def _norm(_: type, config: Any, hidden_size: int, eps: float = EPSILON) -> nn.Module:
    """PyTorch's LayerNorm, which megatron-core has for a whole sequence only."""
    norm = nn.LayerNorm(hidden_size, eps=eps)
    for parameter in norm.parameters():
        # Where it is true, the gradients are summed over the tensor ranks.
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def _model(core: ModuleType, sizes: Sizes, layout: str, tensor: int, pipeline: int) -> nn.Module:
    uneven = {}
    if pipeline > 1:
        first, last = sizes.stage_layers
        uneven = {
            "num_layers_in_first_pipeline_stage": first,
            "num_layers_in_last_pipeline_stage": last,
        }
    config = core.transformer.TransformerConfig(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        layernorm_epsilon=EPSILON,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        sequence_parallel=layout == "tp-sp",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        finalize_model_grads_func=core.finalize.finalize_model_grads,
        **uneven,
    )
    first = core.parallel_state.is_pipeline_first_stage()
    last = core.parallel_state.is_pipeline_last_stage()
    model = core.gpt.GPTModel(
        config=config,
        transformer_layer_spec=core.specs.get_gpt_layer_local_spec(),
        vocab_size=sizes.vocabulary,
        max_sequence_length=sizes.sequence,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute",
    )
    _fill(core, model, sizes)
    options = core.distributed.DistributedDataParallelConfig(
        overlap_grad_reduce=layout == "dp", use_distributed_optimizer=False
    )
    wrapped: nn.Module = core.distributed.DistributedDataParallel(config, options, model)
    return wrapped.train()


@torch.no_grad()
def _fill(core: ModuleType, model: nn.Module, sizes: Sizes) -> None:
    rank = core.parallel_state.get_tensor_model_parallel_rank()
    size = core.parallel_state.get_tensor_model_parallel_world_size()
    behind = core.parallel_state.get_pipeline_model_parallel_rank() > 0
    offset = sizes.stage_layers[0] if behind else 0
    for key, parameter in model.named_parameters():
        module, _, kind = key.rpartition(".")
        for ending, name in _NAMES.items():
            if kind == "weight" and module.endswith(ending):
                number = module.removesuffix(ending).strip(".").rpartition(".")[2]
                full = f"{int(number) + offset}.{name}" if number else name
                parameter.copy_(sizes.part(full, rank, size))


def _counted(parameter: nn.Parameter, first: bool) -> bool:
    """Whether this rank counts a parameter in the norm: each once over tensor and stage ranks."""
    if getattr(parameter, "shared", False):
        return False
    return first or getattr(parameter, "tensor_model_parallel", False)


def _forward(batches: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    tokens = next(batches)
    length = tokens.size(1) - 1
    positions = torch.arange(length).expand(tokens.size(0), -1)
    # True where a position must not be seen, as the unfused softmax wants it.
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    output = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])

    def mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = losses.mean()
        return loss, {"loss": loss.detach().clone()}

    return output, mean
