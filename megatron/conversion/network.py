"""What our network computes from tensors on disk, with one layer of it in memory at a time.

A pipeline stage is the part of a network that runs by itself: built with as many stages as there
are layers, the network is run stage after stage, and each stage's tensors are read when its turn
has come and forgotten behind it. The peak is a layer and the word embeddings.

Letters: s sequence, b batch, h hidden, v vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from megatron.checkpoint.tensor_source import TensorSource
from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.errors import CheckpointError
from megatron.model import BertModel, MegatronModule, build_bert, build_gpt, build_t5
from megatron.model.language_model import Hidden
from megatron.mpu import ParallelState, Stage
from megatron.mpu.stage import encoder_decoder_stages, stages

Inputs = Mapping[str, torch.Tensor]
Outputs = dict[str, torch.Tensor]

# What both sides call their outputs.
MASKED_LM, NEXT_SENTENCE, NEXT_TOKEN = "masked_lm", "next_sentence", "next_token"
HIDDEN, POOLED = "hidden_states", "pooled"

_BUILDERS = {"bert": build_bert, "gpt": build_gpt, "t5": build_t5}


@torch.no_grad()
def run_network(model: ModelConfig, source: TensorSource, inputs: Inputs) -> Outputs:
    """The outputs of the network that `model` describes, in float32.

    inputs: i64[b, s] each, as `fixed_input` makes them. Returns the logits [b, s, v] or [b, 2] of
    the heads whose tensors there are, the hidden states behind the last layer [b, s, h], and what
    was pooled of them [b, h].

    Raises:
        CheckpointError: a tensor of the network is missing or of another shape.
    """
    config = _config(model, inputs["input_ids"].size(1), source.shapes)
    state = ParallelState.single("meta")  # parameters get their values from `source` alone
    received: torch.Tensor | None = None
    for stage in _stages(config.model):
        part = _BUILDERS[model.model_type](config, state, stage).eval()
        assert isinstance(part, MegatronModule)  # no format but float32 wraps it
        _fill(part, source)
        part.set_input_tensor(received)
        if stage.is_last:
            return _run_last(part, inputs)
        received = part(*_arguments(model, inputs))
        _empty(part)
    raise AssertionError("a network has a last stage")


def expect_shapes(model: ModelConfig, source: TensorSource) -> None:
    """Hold the shapes of a model's tensors against its configuration, as far as we compute it.

    Raises:
        CheckpointError: a tensor of the network is missing or of another shape.
    """
    config = _config(model, 1, source.shapes)
    state = ParallelState.single("meta")
    for stage in _stages(config.model):
        try:
            part = _BUILDERS[model.model_type](config, state, stage)
        except (
            RuntimeError,
            OverflowError,
            TypeError,
        ) as error:  # sizes whose product no tensor can have
            first = str(error).partition("\n")[0]
            raise CheckpointError(f"no model has the stated sizes: {first}") from error
        assert isinstance(part, MegatronModule)
        _check(part, source)


def _config(model: ModelConfig, length: int, names: Collection[str]) -> Config:
    own = dataclasses.replace(
        model,
        fp16=False,
        bf16=False,
        fp64=False,
        make_vocab_size_divisible_by=1,
        bert_no_binary_head=not any(name.startswith("language_model.pooler.") for name in names),
    )
    return Config(
        model=own,
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1.0),
        data=DataConfig(seq_length=length),
        train=TrainConfig(micro_batch_size=1),
    )


def _stages(model: ModelConfig) -> tuple[Stage, ...]:
    """Stages of one layer each."""
    encoder = [1] * model.num_layers
    if model.model_type != "t5":
        return stages(encoder)
    return encoder_decoder_stages(encoder, [1] * model.decoder_layers, len(encoder))


def _arguments(model: ModelConfig, inputs: Inputs) -> tuple[Any, ...]:
    """The inputs in the order of the network's forward."""
    if model.model_type == "gpt":
        return (inputs["input_ids"],)
    real = inputs["attention_mask"].bool()
    if model.model_type == "t5":
        return (inputs["input_ids"], inputs["decoder_input_ids"], real)
    return (inputs["input_ids"], real, inputs.get("token_type_ids"))


def _fill(part: MegatronModule, source: TensorSource) -> None:
    """Give a stage its parameters' values; heads whose tensors are missing are taken away."""
    _check(part, source)
    for name, key in _named_keys(part):
        _assign(part, name, source.read(key).float())


def _check(part: MegatronModule, source: TensorSource) -> None:
    """Take away the heads whose tensors are missing; all others have to be of their shapes."""
    if part.config.model.model_type == "bert":
        for head in ("lm_head", "output_layer", "binary_head"):
            module = getattr(part, head)
            if module is not None and not any(key in source.shapes for key in _keys(module)):
                setattr(part, head, None)
    for name, key in _named_keys(part):
        shape = tuple(part.get_parameter(name).shape)
        found = source.shapes.get(key)
        if found != shape:
            raise CheckpointError(
                f"{key} is {'missing' if found is None else found}, expected {shape}"
            )


def _empty(part: MegatronModule) -> None:
    """Let go of a stage's values, whoever still refers to the stage."""
    for name, _ in _named_keys(part):
        _assign(part, name, torch.empty(0))


def _assign(part: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, own = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=False)
    # Emptied, it still has to say what it was.
    spec = part.get_parameter(name).shard_spec  # type: ignore[attr-defined]
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    setattr(part.get_submodule(owner), own, parameter)


def _named_keys(module: nn.Module) -> list[tuple[str, str]]:
    """The names of a module's parameters, there and in a checkpoint."""
    return [
        (name, parameter.shard_spec.key)  # type: ignore[attr-defined]
        for name, parameter in module.named_parameters()
    ]


def _keys(module: nn.Module) -> Iterator[str]:
    return (key for _, key in _named_keys(module))


def _run_last(part: MegatronModule, inputs: Inputs) -> Outputs:
    """The outputs of the last stage, by their names."""
    seen: list[Hidden] = []
    hook = part.language_model.register_forward_hook(lambda *call: seen.append(call[2]))
    result = part(*_arguments(part.config.model, inputs))
    hook.remove()
    (last,) = seen
    outputs = {HIDDEN: last.stream.transpose(0, 1)}
    if last.pooled is not None:
        outputs[POOLED] = last.pooled
    if isinstance(part, BertModel):
        if part.lm_head is not None:
            outputs[MASKED_LM] = result[0]
        if part.binary_head is not None:
            outputs[NEXT_SENTENCE] = part.binary_head(last.pooled)
    else:
        outputs[NEXT_TOKEN] = result
    return outputs
