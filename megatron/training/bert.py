"""BERT's pretraining: masked tokens and sentence pairs (arXiv 1810.04805)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron.config import Config
from megatron.data import build_bert_datasets, max_predictions
from megatron.model import bert_loss_sums, build_bert
from megatron.model.packing import GRID, pack
from megatron.mpu import ParallelState, Stage
from megatron.training.flops import bert_flops_per_sample
from megatron.training.pretraining import Pretraining
from megatron.training.task import Batch, Datasets, Parts, SampleCounts, StageModel

# What packing takes together; it needs the lengths on the host and sends the result on.
_PACKED = ("input_ids", "tokentype_ids", "attention_mask", "masked_positions")


class BertPretraining(Pretraining):
    """The task of `pretrain_bert.py`; see `megatron.training.task.Task`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.model.bert_no_binary_head:
            self.loss_parts = ("lm_loss", "nsp_loss")
        parallel = config.parallel
        self._packs = config.data.pack_sequences
        # With sequence parallelism each tensor rank has an equal part of the row.
        parts = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        self._grid = math.lcm(GRID, parts)
        if self._packs:
            self.host_fields = frozenset(_PACKED)

    def datasets(
        self, config: Config, counts: SampleCounts, say: Callable[[str], None]
    ) -> Datasets:
        """Masked sentence pairs from the dataset of --data-path."""
        wanted = (counts.train, counts.validation, counts.test)
        return Datasets(*build_bert_datasets(config, self.tokenizer, wanted, report=say))

    def build_model(self, config: Config, state: ParallelState, stage: Stage) -> StageModel:
        """The part of BERT that a stage holds."""
        return build_bert(config, state, stage)

    def blank_batch(self, config: Config, device: torch.device) -> Batch:
        """Sentence pairs [b, s] of which k positions are masked."""
        b, s = config.train.micro_batch_size, config.data.seq_length
        k = max_predictions(config)

        def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return {
            "input_ids": numbers(b, s),
            "tokentype_ids": numbers(b, s),
            "attention_mask": numbers(b, s, dtype=torch.bool),
            "masked_positions": numbers(b, k),
            "masked_labels": numbers(b, k),
            "masked_weights": numbers(b, k, dtype=torch.float32),
            "is_random": numbers(b),
        }

    def denominators(self, batch: Batch) -> Tensor:
        """Masked tokens and, with a binary head, sentence pairs: float64 [parts]."""
        masked = batch["masked_weights"].sum(dtype=torch.float64)
        pairs = masked.new_tensor(len(batch["is_random"]))
        return torch.stack([masked, pairs])[: len(self.loss_parts)]

    def forward_step(self, chunk: nn.Module, batch: Batch, totals: Tensor) -> tuple[Tensor, Parts]:
        """Hidden states, or the sum of the masked-token and the next-sentence loss."""
        output = self._run(chunk, batch, totals.device)
        if isinstance(output, Tensor):
            return output, {}
        lm_loss, binary_logits = output
        sums = bert_loss_sums(lm_loss, binary_logits, batch["masked_weights"], batch["is_random"])
        parts = {
            name: value / total for (name, value), total in zip(sums.items(), totals, strict=True)
        }
        loss = torch.stack(list(parts.values())).sum()
        return loss, {name: value.detach() for name, value in parts.items()}

    def _run(
        self, chunk: nn.Module, batch: Batch, device: torch.device
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """What the network makes of a micro-batch."""
        labels = batch["masked_labels"]
        if not self._packs:
            return chunk(
                batch["input_ids"],
                batch["attention_mask"],
                batch["tokentype_ids"],
                lm_labels=labels,
                masked_positions=batch["masked_positions"],
            )
        packed = pack(*(batch[name] for name in _PACKED), multiple=self._grid, device=device)
        return chunk(
            packed.input_ids,
            None,
            packed.tokentype_ids,
            lm_labels=labels,
            masked_positions=packed.masked_positions,
            packing=packed.packing,
        )

    def flops_per_sample(self, config: Config) -> float:
        """Operations of training on one sequence, with the average number of masked tokens."""
        s = config.data.seq_length
        return bert_flops_per_sample(config.model, s, config.data.mask_prob * s)
