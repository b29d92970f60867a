"""Our models and Hugging Face's side by side: built, filled with the same numbers, compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron.checkpoint.hugging_face.models import entries, open_hugging_face
from megatron.checkpoint.name_map import to_ours, to_theirs
from megatron.checkpoint.tensor_source import TensorSource
from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.model import build_bert, build_gpt, build_t5
from megatron.mpu import ParallelState, ShardSpec
from megatron.mpu.stage import encoder_decoder_stages, stages

LENGTH = 9
TOLERANCE = 1e-5
Tensors = dict[str, torch.Tensor]


class DictSource:
    """A `TensorSource` over tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, name: str, /) -> torch.Tensor:
        return self.tensors[name]


def build(model: ModelConfig) -> Any:
    """Our network in one process, in float32, without dropout."""
    config = Config(
        model=model,
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1.0),
        data=DataConfig(seq_length=LENGTH),
        train=TrainConfig(micro_batch_size=2),
    )
    if model.model_type == "t5":
        (stage,) = encoder_decoder_stages([model.num_layers], [model.decoder_layers], 0)
        return build_t5(config, ParallelState.single(), stage).eval()
    (stage,) = stages([model.num_layers])
    builder = build_bert if model.model_type == "bert" else build_gpt
    return builder(config, ParallelState.single(), stage).eval()


def specs(network: torch.nn.Module) -> dict[str, ShardSpec]:
    """How each tensor of a network is split, by its global name."""
    found = [parameter.shard_spec for parameter in network.parameters()]  # type: ignore[attr-defined]
    return {spec.name: spec for spec in found}


def random_tensors(model: ModelConfig, seed: int = 0) -> Tensors:
    """Random values for all global tensors of our model, so that each one out of place shows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(spec.shape, generator=generator)
        for name, spec in specs(build(model)).items()
    }


def fill(network: torch.nn.Module, source: TensorSource) -> Any:
    """Give a network the values of a source, which has to have them all; padding becomes zero."""
    found = specs(network)
    assert source.shapes.keys() == found.keys()
    with torch.no_grad():
        for parameter in network.parameters():
            spec: ShardSpec = parameter.shard_spec  # type: ignore[attr-defined]
            assert source.shapes[spec.name] == spec.shape, spec.name
            parameter.zero_()
            for box in spec.rectangles(0, 1):
                parameter[box.local_slices] = source.read(spec.name)[box.global_slices]
    return network


def theirs_randomised(network: torch.nn.Module, seed: int = 0) -> Any:
    """A network of theirs with random values everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def state_of(network: torch.nn.Module) -> Tensors:
    """Their tensors by name; of those under several names, the first alone."""
    seen: set[int] = set()
    state = {}
    for name, tensor in network.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[name] = tensor
    return state


def assert_map_is_complete(network: Any) -> None:
    """The map has their names, makes our names and shapes of them, and returns the same bits."""
    state = state_of(network)
    model = open_hugging_face(network.config.to_dict(), DictSource(state)).model
    mapped = entries(model)
    names = {their for entry in mapped for their in entry.theirs}
    # Untied, version 5 of their package has the head's bias in two parameters, and uses one.
    assert state.keys() - names <= {"cls.predictions.decoder.bias"}
    assert names <= state.keys()
    ours = dict(to_ours(mapped, state.__getitem__))
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        name: spec.shape for name, spec in specs(build(model)).items()
    }
    for name, tensor in to_theirs(mapped, ours.__getitem__):
        assert torch.equal(tensor, state[name]), name


def ours_from(network: Any) -> Any:
    """Our network with the configuration and the weights of theirs."""
    hf = network.config.to_dict() | {"architectures": [type(network).__name__]}
    opened = open_hugging_face(hf, DictSource(state_of(network)))
    return fill(build(opened.model), opened.tensors)


def tokens(vocab_size: int, seed: int = 0) -> torch.Tensor:
    """i64[2, LENGTH] within the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (2, LENGTH), generator=generator)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference; ours may have columns of padding behind the vocabulary."""
    return (ours[..., : theirs.size(-1)] - theirs).abs().max().item()
