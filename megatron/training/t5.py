"""T5's pretraining: the spans that were cut out of a text are written down (arXiv 1910.10683)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron.config import Config
from megatron.data import build_t5_datasets
from megatron.model import build_t5
from megatron.mpu import ParallelState, Stage
from megatron.mpu.stage import encoder_decoder_stages
from megatron.pipeline.p2p import TensorSpec
from megatron.training.flops import t5_flops_per_sample
from megatron.training.pretraining import (
    Pretraining,
    hidden_states,
    is_last,
    mean_over_tokens,
)
from megatron.training.task import Batch, Datasets, Parts, SampleCounts, StageModel


class T5Pretraining(Pretraining):
    """The task of `pretrain_t5.py`; see `megatron.training.task.Task`."""

    def datasets(
        self, config: Config, counts: SampleCounts, say: Callable[[str], None]
    ) -> Datasets:
        """Texts with spans cut out, and the spans, from the dataset of --data-path."""
        wanted = (counts.train, counts.validation, counts.test)
        return Datasets(*build_t5_datasets(config, self.tokenizer, wanted, report=say))

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """The stages of the encoder, then those of the decoder."""
        model, parallel = config.model, config.parallel
        layers = parallel.encoder_decoder_layers(model.num_layers, model.decoder_layers)
        return encoder_decoder_stages(*layers, parallel.split_rank())

    def build_model(self, config: Config, state: ParallelState, stage: Stage) -> StageModel:
        """The part of T5 that a stage holds."""
        return build_t5(config, state, stage)

    def activation(self, config: Config, state: ParallelState, stage: Stage) -> TensorSpec:
        """Hidden states of the encoder [s, b, h]; in the decoder, those of both [s + sd, b, h]."""
        data = config.data
        length = data.seq_length + (data.decoder_length if stage.has_decoder else 0)
        return hidden_states(config, state, length)

    def blank_batch(self, config: Config, device: torch.device) -> Batch:
        """Texts [b, s] and their spans [b, sd]."""
        b, s = config.train.micro_batch_size, config.data.seq_length
        d = config.data.decoder_length

        def numbers(length: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(b, length, dtype=dtype, device=device)

        return {
            "encoder_ids": numbers(s),
            "decoder_ids": numbers(d),
            "labels": numbers(d),
            "loss_weights": numbers(d, torch.float32),
            "encoder_mask": numbers(s, torch.bool),
        }

    def denominators(self, batch: Batch) -> Tensor:
        """The target's tokens that count: float64 [1]."""
        return batch["loss_weights"].sum(dtype=torch.float64)[None]

    def forward_step(self, chunk: nn.Module, batch: Batch, totals: Tensor) -> tuple[Tensor, Parts]:
        """Hidden states, or the mean loss of the target's tokens."""
        output = chunk(
            batch["encoder_ids"],
            batch["decoder_ids"],
            batch["encoder_mask"],
            lm_labels=batch["labels"],
        )
        if not is_last(chunk):
            return output, {}
        return mean_over_tokens(output, batch["loss_weights"], totals[0])

    def tokens_per_sample(self, config: Config) -> int:
        """The lengths of the encoder's and the decoder's sequence."""
        return config.data.seq_length + config.data.decoder_length

    def flops_per_sample(self, config: Config) -> float:
        """Operations of training on one text and its spans."""
        data = config.data
        return t5_flops_per_sample(config.model, data.seq_length, data.decoder_length)
