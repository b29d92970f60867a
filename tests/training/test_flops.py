"""The counts of operations agree with the published formulas where both count the same."""

import pytest

from megatron.config import ModelConfig
from megatron.training.flops import (
    bert_flops_per_sample,
    gpt_flops_per_sample,
    t5_flops_per_sample,
)
from tests.training.tiny import tiny_config

SHAPE = {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "vocab_size": 30522}


def _model(**fields: object) -> ModelConfig:
    return tiny_config(model=SHAPE | fields).model


def _published(s: int) -> float:
    """Equation 3 of arXiv 2104.04473 without recomputation: 72 in place of 96, 12 of 16."""
    l, h, v = 24, 1024, 30522  # noqa: E741
    return 72 * s * l * h**2 * (1 + s / (6 * h) + v / (12 * l * h))


def test_bert_equals_the_formula_of_arxiv_2104_04473() -> None:
    s, h = 512, 1024
    heads_dense = 3 * 2 * s * h * h  # which the formula leaves out
    found = bert_flops_per_sample(_model(bert_no_binary_head=True), s, k=s)
    assert found == pytest.approx(_published(s) + heads_dense)


def test_gpt_equals_the_formula_of_arxiv_2104_04473() -> None:
    assert gpt_flops_per_sample(_model(), 2048) == pytest.approx(_published(2048))


def test_a_llama_equals_the_formula_of_arxiv_2204_02311() -> None:
    """6N + 12 L H Q T for each of T tokens, N the weights of all products (PaLM, appendix B).

    With the sizes of Llama 3 8B, whose weights less the embedding of its input are 7.50e9.
    """
    model = _model(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=14336,
        vocab_size=128256,
        swiglu=True,
    )
    s = 8192
    queries_and_output, keys_and_values = 2 * 4096 * 4096, 2 * 4096 * 1024
    layer = queries_and_output + keys_and_values + 3 * 4096 * 14336
    weights = 32 * layer + 4096 * 128256
    assert weights == pytest.approx(7.50e9, rel=1e-3)
    assert gpt_flops_per_sample(model, s) == s * (6 * weights + 12 * 32 * 4096 * s)


def test_t5_is_its_encoder_its_decoder_and_the_attention_between_them() -> None:
    """The formula of arXiv 2104.04473 for both stacks, scoring the vocabulary once."""
    s, target, h, l = 512, 128, 1024, 24  # noqa: E741
    logits = 6 * s * h * 30522
    projections, scores = 6 * (2 * target + 2 * s) * h * h, 6 * 2 * target * s * h
    expected = _published(s) - logits + _published(target) + l * (projections + scores)
    assert t5_flops_per_sample(_model(), s, target) == pytest.approx(expected)


def test_only_the_decoder_has_the_layers_of_decoder_num_layers() -> None:
    def flops(layers: int) -> float:
        return t5_flops_per_sample(_model(decoder_num_layers=layers), 512, 128)

    assert flops(2) - flops(1) == pytest.approx(flops(24) - flops(23))
    assert flops(24) == t5_flops_per_sample(_model(), 512, 128)


def test_only_masked_positions_are_scored() -> None:
    model = tiny_config(model={"vocab_size": 30522}).model
    saved = bert_flops_per_sample(model, 16, k=16) - bert_flops_per_sample(model, 16, k=2)
    assert saved == 3 * 2 * 14 * 16 * (30522 + 16)
