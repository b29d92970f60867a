"""What all networks have in common: the shared word embedding, and number formats.

With more than one pipeline stage the word embedding is needed at both ends of the pipeline: to
look tokens up and to score them. The last stage then holds a copy, created as zeros and equalised
with the first stage's by an all-reduce. In training the two gradients are summed over the same
group before each step (the optimizer does it, told by ``shard_spec.tied_to``), so that both
copies receive the same update forever after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megatron.config import Config
from megatron.model.enums import ModelType
from megatron.mpu import (
    ParallelState,
    ShardSpec,
    Stage,
    VocabParallelEmbedding,
    gather_from_tensor_region,
    linear_cross_entropy,
    parallel_lm_logits,
    vocab_parallel_cross_entropy,
)
from megatron.mpu.collectives import all_reduce
from megatron.mpu.init import InitMethod, create_parameter, zeros
from megatron.mpu.parallel_state import Axis


def parameter_dtype(config: Config) -> torch.dtype:
    """Number format of the parameters."""
    dtype = getattr(torch, config.model.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def stream_dtype(config: Config) -> torch.dtype:
    """Number format of the residual stream, and so of the activations between stages."""
    dtype = parameter_dtype(config)
    exact = config.model.fp32_residual_connection
    return torch.promote_types(dtype, torch.float32) if exact else dtype


def to_stream(x: torch.Tensor, config: Config) -> torch.Tensor:
    """``x``, made by a model in its format, in the format of the residual stream."""
    exact = config.model.fp32_residual_connection
    return x.to(torch.promote_types(x.dtype, torch.float32)) if exact else x


def splits_sequence(config: Config, state: ParallelState) -> bool:
    """Whether the residual stream is split along the sequence over the tensor ranks."""
    return config.parallel.sequence_parallel and state.tensor.size > 1


def new_parameter(
    config: Config, state: ParallelState, spec: ShardSpec, init_method: InitMethod
) -> nn.Parameter:
    """This rank's part of the parameter that ``spec`` describes, in the model's format."""
    return create_parameter(
        spec, state.tensor, init_method, dtype=parameter_dtype(config), device=state.device
    )


class MegatronModule(nn.Module):
    """A network, or the part of it that one pipeline stage holds.

    Args:
        parallel_output: whether logits stay split along the vocabulary.
    """

    model_type = ModelType.encoder_or_decoder
    language_model: nn.Module

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        stage: Stage,
        *,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        parallel_output: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.state = state
        self.stage = stage
        self.pre_process = stage.is_first if pre_process is None else pre_process
        self.post_process = stage.is_last if post_process is None else post_process
        self.parallel_output = parallel_output
        # Whether tokens are scored by the word embeddings, not by an output layer of their own.
        self.share_word_embeddings = not config.model.untie_embeddings_and_output_weights

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """Give the activation that the previous stage sent, for the next forward."""
        self.language_model.set_input_tensor(input_tensor)  # type: ignore[operator]

    def initialize_word_embeddings(self) -> None:
        """Create the last stage's copy of the word embedding and make all copies equal.

        A decoder's copy of the embedding, positions included, is made equal, too. Every rank that
        holds one of them must call it; it does nothing on a single stage.
        """
        if self.pre_process and self.post_process:
            return
        embedding = getattr(self.language_model, "embedding", None)
        if self.post_process and self.share_word_embeddings and embedding is None:
            self.word_embeddings = word_embeddings_copy(self.config, self.state)
        if embedding is not None or (self.post_process and self.share_word_embeddings):
            # A last stage with an output layer of its own has no part in it.
            shared = self.share_word_embeddings
            axis = self.state.embedding if shared else self.state.position_embedding
            _equalise(self.word_embeddings_weight(), axis)
        if embedding is not None and embedding.position_embeddings is not None:
            _equalise(embedding.position_embeddings.weight, self.state.position_embedding)

    def word_embeddings_weight(self) -> torch.Tensor:
        """This stage's copy of the word embedding [v / t, h].

        Raises:
            RuntimeError: this stage holds none.
        """
        embedding = getattr(self.language_model, "embedding", None)
        if embedding is not None:
            weight = embedding.word_embeddings.weight
        elif self.post_process and self.share_word_embeddings:
            weight = self.word_embeddings.weight
        else:
            raise RuntimeError("this stage holds no word embedding")
        assert isinstance(weight, torch.Tensor)
        return weight

    def output_weight(self) -> torch.Tensor:
        """What scores tokens on the last stage, [v / t, h]: an output layer, or word embeddings."""
        layer = getattr(self, "output_layer", None)
        return self.word_embeddings_weight() if layer is None else layer.weight

    def loss_or_logits(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None,
        bias: torch.Tensor | None = None,
        *,
        split_sequence: bool = False,
    ) -> torch.Tensor:
        """Score tokens: the loss of each label, or without labels the logits.

        Args:
            hidden: [..., h], the same on all tensor ranks; with ``split_sequence`` [s / t, ..., h].
            labels: i64[...], of the whole sequence.
            bias: [v / t], of each token's score.

        Returns:
            [...] in float32 or wider; or [..., v / t] or, without ``parallel_output``,
            [..., true vocabulary].
        """
        vocab_size, axis = _known_vocab_size(self.config), self.state.tensor
        weight = self.output_weight()
        chunk = self.config.train.cross_entropy_chunk
        if labels is not None and chunk is not None:
            return linear_cross_entropy(
                *(hidden, weight, bias, labels, axis, vocab_size),
                chunk=chunk,
                split_sequence=split_sequence,
            )
        logits = parallel_lm_logits(hidden, weight, axis, bias, sequence_parallel=split_sequence)
        if labels is not None:
            return vocab_parallel_cross_entropy(logits, labels, axis, vocab_size, overwrite=True)
        if self.parallel_output:
            return logits
        return gather_from_tensor_region(logits, axis)[..., :vocab_size]

    def state_dict_for_save_checkpoint(self) -> dict[str, torch.Tensor]:
        """This rank's tensors by global name; a copy that belongs to another stage is left out."""
        return {
            parameter.shard_spec.name: parameter.data  # type: ignore[attr-defined]
            for parameter in self.parameters()
            if parameter.shard_spec.tied_to is None  # type: ignore[attr-defined]
        }


def word_embeddings_copy(config: Config, state: ParallelState) -> VocabParallelEmbedding:
    """The last stage's copy of the first one's word embedding: zeros, until it is made equal."""
    return VocabParallelEmbedding(
        _known_vocab_size(config),
        config.model.hidden_size,
        name="word_embeddings_for_head",
        tied_to=_WORD_EMBEDDINGS,
        padded=config.model.padded_vocab_size(state.tensor.size),
        state=state,
        init_method=zeros,
        dtype=parameter_dtype(config),
    )


def _equalise(weight: torch.Tensor, axis: Axis | None) -> None:
    """Give all ranks of the axis the values of the one that has some; the others have zeros."""
    if axis is not None and not weight.is_meta:
        all_reduce(weight.data, axis)


_WORD_EMBEDDINGS = "language_model.embedding.word_embeddings.weight"


def _known_vocab_size(config: Config) -> int:
    assert config.model.vocab_size is not None, "the vocabulary's size is set from the tokenizer"
    return config.model.vocab_size


def conversion_helper(value: Any, conversion: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply ``conversion`` to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return conversion(value)
    if isinstance(value, tuple | list):
        return type(value)(conversion_helper(item, conversion) for item in value)
    if isinstance(value, dict):
        return {key: conversion_helper(item, conversion) for key, item in value.items()}
    return value


def fp32_to_float16(value: Any, dtype: torch.dtype) -> Any:
    """Convert the float32 tensors in ``value`` to ``dtype``; everything else stays."""
    return conversion_helper(value, lambda t: t.to(dtype) if t.dtype == torch.float32 else t)


def float16_to_fp32(value: Any) -> Any:
    """Convert the half-precision tensors in ``value`` to float32; everything else stays."""
    half = (torch.float16, torch.bfloat16)
    return conversion_helper(value, lambda t: t.float() if t.dtype in half else t)


class Float16Module(nn.Module):
    """A network in half precision whose inputs and outputs, at the pipeline's ends, are float32."""

    def __init__(self, module: MegatronModule) -> None:
        super().__init__()
        self.dtype = parameter_dtype(module.config)
        self.module = module.to(self.dtype)

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """See :meth:`MegatronModule.set_input_tensor`."""
        self.module.set_input_tensor(input_tensor)

    def forward(self, *inputs: Any, **named_inputs: Any) -> Any:
        """The network's forward, with conversions on the first and on the last stage."""
        if self.module.pre_process:
            inputs = fp32_to_float16(inputs, self.dtype)
            named_inputs = fp32_to_float16(named_inputs, self.dtype)
        outputs = self.module(*inputs, **named_inputs)
        return float16_to_fp32(outputs) if self.module.post_process else outputs

    def state_dict_for_save_checkpoint(self) -> dict[str, torch.Tensor]:
        """See :meth:`MegatronModule.state_dict_for_save_checkpoint`."""
        return self.module.state_dict_for_save_checkpoint()


def in_half(model: MegatronModule) -> MegatronModule | Float16Module:
    """``model``, wrapped where its configuration is in half precision."""
    half = model.config.model.fp16 or model.config.model.bf16
    return Float16Module(model) if half else model
