"""Models of random values in memory that offer their tensors one at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.config import Config
from megatron.conversion.stored_model import StoredModel
from megatron.model import MegatronModule, build_bert, build_gpt, build_t5
from megatron.mpu import ParallelState, Stage
from megatron.mpu.stage import encoder_decoder_stages
from tests.configs import small

VOCABULARY = 61
BERT = {
    "num_layers": 3,
    "hidden_size": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 12,
    "seq_length": 12,
    "make_vocab_size_divisible_by": 8,
}
GPT = BERT | {"model_type": "gpt"}
GPT2 = GPT | {"activation": "gelu_tanh"}
LLAMA = GPT | {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "ffn_hidden_size": 24,
    "num_query_groups": 2,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
}
T5 = BERT | {"model_type": "t5", "decoder_num_layers": 2}
T5_OF_HF = T5 | {
    "position_embedding_type": "relative",
    "normalization": "RMSNorm",
    "activation": "relu",
    "disable_bias_linear": True,
    "attention_scale": 1.0,
    "logit_scale": 0.25,
}
POST_BERT = BERT | {"norm_position": "post"}

_BUILDERS = {"bert": build_bert, "gpt": build_gpt, "t5": build_t5}


def build(config: Config) -> MegatronModule:
    """A whole network with random values everywhere, so that a tensor in the wrong place shows."""
    model = config.model
    stage = Stage(0, 1, 0, model.num_layers)
    if model.model_type == "t5":
        (stage,) = encoder_decoder_stages((model.num_layers,), (model.decoder_layers,), 0)
    network = _BUILDERS[model.model_type](config, ParallelState.single(), stage).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return network


class InMemory:
    """The tensors of a network, handed out as copies; `live_bytes` counts those still in use."""

    def __init__(self, network: torch.nn.Module) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for parameter in network.parameters():
            spec = parameter.shard_spec
            tensor = parameter.detach()
            self._tensors[spec.key] = tensor[: spec.shape[0]] if spec.shape else tensor
        self.shapes = {name: tuple(t.shape) for name, t in self._tensors.items()}
        self.dtypes = {name: t.dtype for name, t in self._tensors.items()}
        self.live_bytes = self.most_live_bytes = 0

    def read(self, name: str, /) -> torch.Tensor:
        """A copy of a tensor."""
        if self.dtypes[name] == torch.bfloat16:
            return self._tensors[name].clone()
        array = np.array(self._tensors[name].numpy())
        self.live_bytes += array.nbytes
        self.most_live_bytes = max(self.most_live_bytes, self.live_bytes)
        weakref.finalize(array, self._forget, array.nbytes)
        return torch.from_numpy(array)

    def multiply(self, name: str, factor: float) -> None:
        """Make the values of a tensor larger."""
        self._tensors[name] = self._tensors[name] * factor

    def _forget(self, count: int) -> None:
        self.live_bytes -= count


def stored(**values: Any) -> tuple[StoredModel, torch.nn.Module]:
    """A model of the configuration with these fields, and its whole network."""
    config = small(**values)
    network = build(config)
    source = InMemory(network)
    return StoredModel("memory", Path("memory"), config.model, source), network


def without(source: InMemory, *prefixes: str) -> InMemory:
    """The source, its tensors with such names taken away."""
    for name in [name for name in source.shapes if name.startswith(prefixes)]:
        del source.shapes[name], source.dtypes[name]
    return source
