"""The count of operations agrees with the published formula where both count the same."""

import pytest

from megatron.training.flops import bert_flops_per_sample
from tests.training.tiny import tiny_config


def test_equals_the_formula_of_arxiv_2104_04473_without_recomputation() -> None:
    shape = {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16}
    model = tiny_config(model=shape | {"vocab_size": 30522, "bert_no_binary_head": True}).model
    s, l, h, v = 512, 24, 1024, 30522  # noqa: E741
    published = 72 * s * l * h**2 * (1 + s / (6 * h) + v / (12 * l * h))
    heads_dense = 3 * 2 * s * h * h  # which the formula leaves out
    assert bert_flops_per_sample(model, s, k=s) == pytest.approx(published + heads_dense)


def test_only_masked_positions_are_scored() -> None:
    model = tiny_config(model={"vocab_size": 30522}).model
    saved = bert_flops_per_sample(model, 16, k=16) - bert_flops_per_sample(model, 16, k=2)
    assert saved == 3 * 2 * 14 * 16 * (30522 + 16)
