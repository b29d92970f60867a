"""GPT's pretraining: each token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron.config import Config
from megatron.data import build_gpt_datasets
from megatron.model import build_gpt
from megatron.mpu import ParallelState, Stage
from megatron.training.flops import gpt_flops_per_sample
from megatron.training.pretraining import Pretraining, is_last, mean_over_tokens
from megatron.training.task import Batch, Datasets, Parts, SampleCounts, StageModel


class GPTPretraining(Pretraining):
    """The task of `pretrain_gpt.py`; see `megatron.training.task.Task`."""

    # Attention takes the documents' lengths as plain numbers, to cut its work by them.
    host_fields = frozenset({"document_lengths"})

    def datasets(
        self, config: Config, counts: SampleCounts, say: Callable[[str], None]
    ) -> Datasets:
        """Stretches of text from the dataset of --data-path."""
        wanted = (counts.train, counts.validation, counts.test)
        return Datasets(*build_gpt_datasets(config, self.tokenizer, wanted, report=say))

    def build_model(self, config: Config, state: ParallelState, stage: Stage) -> StageModel:
        """The part of GPT that a stage holds."""
        return build_gpt(config, state, stage)

    def blank_batch(self, config: Config, device: torch.device) -> Batch:
        """Tokens [b, s + 1] and what they count [b, s]; on the host the documents' lengths."""
        b, s = config.train.micro_batch_size, config.data.seq_length
        batch = {
            "tokens": torch.zeros(b, s + 1, dtype=torch.int64, device=device),
            "loss_weights": torch.zeros(b, s, device=device),
        }
        if config.data.reset_position_ids:
            batch["position_ids"] = torch.zeros(b, s, dtype=torch.int64, device=device)
        if config.data.reset_attention_mask:
            batch["document_lengths"] = torch.zeros(b, s, dtype=torch.int64)
            batch["document_lengths"][:, 0] = s
        return batch

    def denominators(self, batch: Batch) -> Tensor:
        """The tokens that count: float64 [1]."""
        return batch["loss_weights"].sum(dtype=torch.float64)[None]

    def forward_step(self, chunk: nn.Module, batch: Batch, totals: Tensor) -> tuple[Tensor, Parts]:
        """Hidden states, or the mean loss of the next tokens."""
        tokens = batch["tokens"]
        output = chunk(
            tokens[:, :-1],
            batch.get("position_ids"),
            batch.get("document_lengths"),
            labels=tokens[:, 1:],
        )
        if not is_last(chunk):
            return output, {}
        return mean_over_tokens(output, batch["loss_weights"], totals[0])

    def flops_per_sample(self, config: Config) -> float:
        """Operations of training on one sequence."""
        return gpt_flops_per_sample(config.model, config.data.seq_length)
