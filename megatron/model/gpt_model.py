"""GPT: each token predicts the next one (arXiv 2005.14165), with the layers as configured.

With learned positions, LayerNorm, GELU and tied embeddings it is the GPT of the Megatron lineage;
with rotary positions, RMSNorm, SwiGLU, grouped queries, no biases and an output layer of its own it
is a model of the Llama family.

Letters: s sequence, b micro-batch, h hidden, m most documents in a sequence, v padded vocabulary,
t tensor size.
"""

from __future__ import annotations

import torch

from megatron.config import Config
from megatron.model.language_model import TransformerLanguageModel, get_language_model
from megatron.model.module import Float16Module, MegatronModule, in_half
from megatron.model.output_layer import OutputLayer, scaled
from megatron.mpu import ParallelState, Stage
from megatron.ops.attention import AttentionMask


class GPTModel(MegatronModule):
    """The part of GPT that one pipeline stage holds.

    Args:
        parallel_output: whether logits stay split along the vocabulary.
    """

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        stage: Stage,
        *,
        parallel_output: bool = True,
        pre_process: bool | None = None,
        post_process: bool | None = None,
    ) -> None:
        super().__init__(
            config,
            state,
            stage,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=parallel_output,
        )
        self.language_model: TransformerLanguageModel
        self.language_model, name = get_language_model(
            config,
            state,
            stage,
            pre_process=self.pre_process,
            post_process=self.post_process,
        )
        self.output_layer = (
            OutputLayer(config, state, f"{name}.output_layer")
            if self.post_process and not self.share_word_embeddings
            else None
        )
        self.initialize_word_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        document_lengths: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run this stage.

        Args:
            input_ids: i64[b, s].
            position_ids: i64[b, s]; from 0 in each row where they are not given.
            document_lengths: i64[b, m] on the host, the lengths of the documents of each row,
                filled up with zeros: no token looks beyond its own document. None for one.
            labels: i64[b, s], the token that follows each.

        Returns:
            Before the last stage, hidden states [s, b, h], s / t positions of them with sequence
            parallelism. On the last one the loss [b, s] in float32 or wider, or without labels the
            logits, [b, s, v / t] or, without ``parallel_output``, [b, s, true vocabulary].
        """
        mask = AttentionMask(causal=True, document_lengths=document_lengths)
        hidden = self.language_model(input_ids, position_ids, mask).stream
        if not self.post_process:
            return hidden
        scored = self.loss_or_logits(
            scaled(hidden, self.config),
            None if labels is None else labels.t(),
            split_sequence=self.config.parallel.sequence_parallel,
        )
        return scored.transpose(0, 1)


def build_gpt(config: Config, state: ParallelState, stage: Stage) -> MegatronModule | Float16Module:
    """GPT as the configuration describes it, wrapped where it is in half precision."""
    return in_half(GPTModel(config, state, stage))
