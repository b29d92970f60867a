"""What the tasks of pretraining a transformer on text have in common."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from megatron.config import Config
from megatron.model import Float16Module, MegatronModule, stream_dtype
from megatron.mpu import ParallelState, Stage, stages
from megatron.pipeline.p2p import TensorSpec
from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.training.task import Parts


class Pretraining:
    """The parts of `megatron.training.task.Task` that do not depend on the kind of model.

    `loss_parts` and `host_fields` are those of a model whose loss is the mean over its tokens.
    """

    loss_parts: tuple[str, ...] = ("lm_loss",)
    host_fields: frozenset[str] = frozenset()

    def __init__(self, config: Config) -> None:
        self._data = config.data

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the flags name, opened when it is first asked for."""
        return build_tokenizer(self._data)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, without padding."""
        return self.tokenizer.vocab_size

    @property
    def tokenizer_files(self) -> Sequence[Path]:
        """The files that the tokenizer was read from."""
        return self.tokenizer.files

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """The stages of one stack of layers."""
        return stages(config.parallel.stage_layers(config.model.num_layers))

    def activation(self, config: Config, state: ParallelState, stage: Stage) -> TensorSpec:
        """Hidden states [s, b, h]."""
        return hidden_states(config, state, config.data.seq_length)

    def tokens_per_sample(self, config: Config) -> int:
        """The length of the sequence."""
        return config.data.seq_length


def hidden_states(config: Config, state: ParallelState, length: int) -> TensorSpec:
    """What travels between stages for sequences of `length` tokens: [length, b, h].

    With sequence parallelism each tensor rank sends its part of the sequence.
    """
    rows = length // state.tensor.size if config.parallel.sequence_parallel else length
    shape = (rows, config.train.micro_batch_size, config.model.hidden_size)
    return TensorSpec(shape, stream_dtype(config))


def is_last(chunk: nn.Module) -> bool:
    """Whether a task's network ends in the loss."""
    module = chunk.module if isinstance(chunk, Float16Module) else chunk
    assert isinstance(module, MegatronModule)
    return module.post_process


def mean_over_tokens(losses: Tensor, weights: Tensor, total: Tensor) -> tuple[Tensor, Parts]:
    """A micro-batch's share of the mean loss over the tokens of a global batch, as "lm_loss".

    losses, weights: [b, s]; total: the sum of the weights in the whole global batch.
    """
    loss = (losses * weights.to(losses.dtype)).sum() / total
    return loss, {"lm_loss": loss.detach()}
