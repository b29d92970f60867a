"""How many floating-point operations a model needs, for the figure of model FLOP/s.

Only what the mathematics asks for is counted, as for the model FLOPs utilisation of PaLM
(arXiv 2204.02311, appendix B): matrix products alone, two operations for each multiply and add, the
backward pass at twice the forward pass. Recomputed activations, vocabulary padding and whatever
else an implementation does on top count nothing. One convention of the field is kept that counts
too much: causal attention counts as if every position saw every other, as in that appendix and in
arXiv 2104.04473, so that figures can be compared.

With all positions scored, attention as wide as the hidden state and an MLP four times as wide this
is equation 3 of arXiv 2104.04473 without its recomputation, 72 s l h^2 (1 + s / 6h + v / 12lh) per
sequence.

Letters: s sequence, l layers, h hidden, a width of all query heads together, f width of the MLP,
k scored positions, v vocabulary.
"""

from __future__ import annotations

from megatron.config import ModelConfig

FORWARD_AND_BACKWARD = 3


def attention_flops(model: ModelConfig, queries: int, keys: int) -> float:
    """Forward operations of one attention of `queries` positions to `keys` positions."""
    h, a = model.hidden_size, model.num_attention_heads * model.head_size
    key_width = model.key_value_heads * model.head_size
    projections = 2 * (queries * h * a + 2 * keys * h * key_width + queries * a * h)
    return projections + 2 * queries * keys * a * 2  # scores, and the weighted sum of the values


def mlp_flops(model: ModelConfig, s: int) -> float:
    """Forward operations of one MLP at `s` positions; a gate is a third product."""
    return 2 * s * model.hidden_size * model.ffn_size * (3 if model.is_gated else 2)


def layers_flops(model: ModelConfig, s: int) -> float:
    """Forward operations of --num-layers layers on one sequence of `s` tokens."""
    return model.num_layers * (attention_flops(model, s, s) + mlp_flops(model, s))


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
    return FORWARD_AND_BACKWARD * (layers_flops(model, s) + heads)


def gpt_flops_per_sample(model: ModelConfig, s: int) -> float:
    """Operations of training GPT on one sequence of `s` tokens."""
    return FORWARD_AND_BACKWARD * (layers_flops(model, s) + logits_flops(model, s))


def t5_flops_per_sample(model: ModelConfig, source: int, target: int) -> float:
    """Operations of training T5 to turn a sequence of `source` tokens into one of `target`."""
    decoder_layer = (
        attention_flops(model, target, target)
        + attention_flops(model, target, source)
        + mlp_flops(model, target)
    )
    decoder = model.decoder_layers * decoder_layer
    return FORWARD_AND_BACKWARD * (
        layers_flops(model, source) + decoder + logits_flops(model, target)
    )
