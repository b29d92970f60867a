"""How many floating-point operations a model needs, for the figure of model FLOP/s.

Only what the mathematics asks for is counted, as for the model FLOPs utilisation of PaLM
(arXiv 2204.02311, appendix B): matrix products alone, two operations for each multiply and add, the
backward pass at twice the forward pass. Recomputed activations, vocabulary padding and whatever
else an implementation does on top count nothing. With all positions scored and attention as wide
as the hidden state this is equation 3 of arXiv 2104.04473 without its recomputation,
72 s l h^2 (1 + s / 6h + v / 12lh) per sequence.

Letters: s sequence, l layers, h hidden, a width of all heads together, f width of the MLP,
k scored positions, v vocabulary.
"""

from __future__ import annotations

from megatron.config import ModelConfig

FORWARD_AND_BACKWARD = 3


def encoder_flops(model: ModelConfig, s: int) -> float:
    """Forward operations of all layers on one sequence of `s` tokens that all see each other."""
    h, f, a = model.hidden_size, model.ffn_size, model.num_attention_heads * model.head_size
    projections = 2 * s * (3 * h * a + a * h)
    attention = 2 * s * s * a * 2  # scores, and the weighted sum of the values
    mlp = 2 * s * (h * f + f * h)
    return model.num_layers * (projections + attention + mlp)


def logits_flops(model: ModelConfig, k: int | float) -> float:
    """Forward operations of scoring the vocabulary at `k` positions."""
    assert model.vocab_size is not None, "the vocabulary's size is set from the tokenizer"
    return 2 * k * model.hidden_size * model.vocab_size


def bert_flops_per_sample(model: ModelConfig, s: int, k: int | float) -> float:
    """Operations of training BERT on one sequence of `s` tokens of which `k` are masked."""
    h = model.hidden_size
    heads = logits_flops(model, k) + 2 * k * h * h
    if not model.bert_no_binary_head:
        heads += 2 * h * h + 2 * h * 2  # pooler and binary head, at one position
    return FORWARD_AND_BACKWARD * (encoder_flops(model, s) + heads)
