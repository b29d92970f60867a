"""BERT (arXiv 1810.04805), by default with pre-LayerNorm layers (arXiv 1909.08053).

Two heads stand on the encoder. The masked-LM head predicts the tokens that were masked; in
training it is computed at the masked positions alone, gathered before it, which spares about 85 %
of the product with the vocabulary. The binary head tells from the pooled first token whether the
second sentence follows the first.

Samples may be packed (`packing`): their real tokens then lie in one row, a document each.

Letters: s sequence, b micro-batch, h hidden, k masked positions of a sample, v padded vocabulary,
t tensor size, r row of packed samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron.config import Config
from megatron.model.language_model import TransformerLanguageModel, get_language_model
from megatron.model.linear import WholeLinear
from megatron.model.module import (
    Float16Module,
    MegatronModule,
    in_half,
    new_parameter,
    splits_sequence,
)
from megatron.model.output_layer import OutputLayer
from megatron.model.packing import Packing
from megatron.model.residual import Norm
from megatron.mpu import (
    ParallelState,
    ShardSpec,
    Stage,
    gather_from_sequence_region,
    parallel_lm_logits,
)
from megatron.mpu.init import zeros
from megatron.ops.activation import ACTIVATIONS
from megatron.ops.attention import AttentionMask, padding_mask


class BertLMHead(nn.Module):
    """Hidden states to this rank's logits: dense, activation, norm, word embeddings and a bias."""

    def __init__(self, config: Config, state: ParallelState, name: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.model.lm_head_activation]
        self.axis = state.tensor
        vocab_size = config.model.vocab_size
        assert vocab_size is not None
        self.dense = WholeLinear(config, state, f"{name}.dense")
        self.layernorm = Norm(config, state, f"{name}.layernorm", on_stream=False)
        padded = config.model.padded_vocab_size(state.tensor.size)
        spec = ShardSpec(f"{name}.bias", (vocab_size,), dim=0, padded=padded)
        self.bias = new_parameter(config, state, spec, zeros)

    def forward(self, hidden: torch.Tensor, word_embeddings: torch.Tensor) -> torch.Tensor:
        """[..., h], [v / t, h] -> [..., v / t]"""
        return parallel_lm_logits(self.transformed(hidden), word_embeddings, self.axis, self.bias)

    def transformed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the word embeddings score tokens from: [..., h] -> [..., h]"""
        normed: torch.Tensor = self.layernorm(self.activation(self.dense(hidden)))
        return normed


class BertModel(MegatronModule):
    """The part of BERT that one pipeline stage holds.

    Args:
        num_tokentypes: rows of the token-type embedding; by default as the configuration says.
        add_binary_head: whether there is next-sentence prediction.
        parallel_output: whether logits stay split along the vocabulary.
    """

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        stage: Stage,
        *,
        num_tokentypes: int | None = None,
        add_binary_head: bool = True,
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
            num_tokentypes=(
                config.model.num_tokentypes if num_tokentypes is None else num_tokentypes
            ),
            add_pooler=add_binary_head,
            pre_process=self.pre_process,
            post_process=self.post_process,
        )
        self.lm_head = BertLMHead(config, state, "lm_head") if self.post_process else None
        self.output_layer = (
            OutputLayer(config, state, f"{name}.output_layer")
            if self.post_process and not self.share_word_embeddings
            else None
        )
        self.binary_head = (
            WholeLinear(config, state, "binary_head", 2)
            if self.post_process and add_binary_head
            else None
        )
        self.initialize_word_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        tokentype_ids: torch.Tensor | None = None,
        lm_labels: torch.Tensor | None = None,
        masked_positions: torch.Tensor | None = None,
        packing: Packing | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Run this stage.

        Args:
            input_ids, tokentype_ids: i64[b, s], packed i64[1, r].
            attention_mask: bool[b, s], True where a token is real; None packed.
            masked_positions: i64[b, k], the positions to predict, packed their places in the row;
                None for all s of them.
            lm_labels: i64[b, k or s], the tokens to predict there.
            packing: how the samples lie in the row; None where they are not packed.

        Returns:
            Before the last stage, hidden states [s, b, h], s / t positions of them with
            sequence parallelism. On the last one a pair: the masked-LM
            loss [b, k or s] in float32 or wider, or without labels the logits, [b, k or s, v / t]
            or, without ``parallel_output``, [b, k or s, true vocabulary]; and the next-sentence
            logits [b, 2], None without a binary head.
        """
        if packing is None:
            assert attention_mask is not None
            mask = AttentionMask(keys=padding_mask(attention_mask))
        else:
            mask = AttentionMask(document_lengths=packing.document_lengths)
        hidden, pooled, _ = self.language_model(
            input_ids,
            None if packing is None else packing.position_ids,
            mask,
            tokentype_ids=tokentype_ids,
            pooling_sequence_index=0 if packing is None else packing.first_tokens,
        )
        if self.lm_head is None:
            return hidden
        if splits_sequence(self.config, self.state):
            # All ranks go on with the same masked positions, hence have the same gradient.
            hidden = gather_from_sequence_region(hidden, self.state.tensor, whole_gradient=True)
        hidden = _at_positions(hidden, masked_positions)
        scored = self.loss_or_logits(self.lm_head.transformed(hidden), lm_labels, self.lm_head.bias)
        binary_logits = None if self.binary_head is None else self.binary_head(pooled)
        return scored, binary_logits


def _at_positions(hidden: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """[s, b, h], i64[b, k] -> [b, k, h]; without positions all of them, [b, s, h].

    [r, 1, h], i64[b, k] -> [b, k, h] where the samples are packed.
    """
    if positions is None:
        return hidden.transpose(0, 1)
    batch = hidden.size(1)
    # Row of position p of sample i in the flattened [s b, h]: a single gather by rows.
    rows = positions * batch + torch.arange(batch, device=positions.device)[:, None]
    return hidden.flatten(0, 1).index_select(0, rows.flatten()).view(*positions.shape, -1)


def build_bert(
    config: Config, state: ParallelState, stage: Stage
) -> MegatronModule | Float16Module:
    """BERT as the configuration describes it, wrapped where it is in half precision."""
    add_binary_head = not config.model.bert_no_binary_head
    return in_half(BertModel(config, state, stage, add_binary_head=add_binary_head))


def bert_loss_sums(
    lm_loss: torch.Tensor,
    binary_logits: torch.Tensor | None,
    masked_weights: torch.Tensor,
    is_random: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The parts of BERT's loss, summed over masked tokens and over sentence pairs.

    Args:
        lm_loss: [b, k]; masked_weights: [b, k], 1 for a masked token and 0 for padding.
        binary_logits: [b, 2] or None; is_random: i64[b], 1 where the second sentence is random.
    """
    sums = {"lm_loss": (lm_loss * masked_weights.to(lm_loss.dtype)).sum()}
    if binary_logits is not None:
        sums["nsp_loss"] = F.cross_entropy(binary_logits, is_random, reduction="sum")
    return sums
