"""Looking into the layers: what is left behind is what was computed, and changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.model.enums import LayerType
from megatron.model.language_model import TransformerLanguageModel
from megatron.model.probe import Extras, Record
from megatron.mpu import ParallelState, stages
from megatron.ops.attention import AttentionMask
from tests.configs import small

LAYERS, HIDDEN, HEADS, VOCAB = 3, 24, 4, 40
KINDS: list[dict[str, Any]] = [
    {},
    {"norm_position": "post"},
    {"position_embedding_type": "relative_key"},
    {"position_embedding_type": "relative_key_query", "num_query_groups": 2},
    {"model_type": "gpt", "num_query_groups": 2, "attention_scale": 0.7},
]


def new_model(kind: dict[str, Any], **options: Any) -> TransformerLanguageModel:
    config = small(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        vocab_size=VOCAB,
        init_method_std=0.3,
        fp64=True,
        **kind,
    )
    return TransformerLanguageModel(
        config, ParallelState.single(), stages([LAYERS])[0], **options
    ).eval()


def random_ids(length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_changes_nothing_and_holds_what_was_asked_for(kind: dict[str, Any]) -> None:
    model, ids = new_model(kind), random_ids(9)
    plain = model(ids, None, AttentionMask(causal=True)).stream
    record = Record(hidden_states=[], attentions=[], caches=[])
    seen = model(ids, None, AttentionMask(causal=True), extras=Extras(record=record)).stream
    torch.testing.assert_close(seen, plain, rtol=1e-12, atol=1e-12)
    assert record.hidden_states is not None and record.attentions is not None
    assert len(record.hidden_states) == len(record.attentions) == LAYERS
    for weights in record.attentions:
        assert weights.shape == (2, HEADS, 9, 9)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 9, dtype=torch.float64))
        assert weights.triu(1).count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_from_a_cache_is_going_on(kind: dict[str, Any]) -> None:
    model, ids = new_model(kind), random_ids(8)
    whole = model(ids, None, AttentionMask(causal=True)).stream
    record = Record(caches=[])
    model(ids[:, :7], None, AttentionMask(causal=True), extras=Extras(record=record))
    assert record.caches is not None
    # One new position may see all.
    extras = Extras(past=record.caches)
    last = model(ids[:, 7:], torch.tensor([[7]]), AttentionMask(), extras=extras).stream
    torch.testing.assert_close(last[0], whole[7], rtol=1e-10, atol=1e-10)


def test_a_masked_head_is_silent() -> None:
    model, ids = new_model({}), random_ids(6)
    masks = torch.ones(LAYERS, 1, HEADS, 1, 1, dtype=torch.float64)
    masks[1, :, 2] = 0.0
    masked = model(ids, None, AttentionMask(), extras=Extras(head_masks=masks)).stream
    assert model.encoder is not None
    head_size = HIDDEN // HEADS
    with torch.no_grad():
        dense = model.encoder.layers[1].self_attention.dense  # type: ignore[union-attr]
        dense.weight[:, 2 * head_size : 3 * head_size] = 0.0  # type: ignore[index]
    torch.testing.assert_close(
        masked, model(ids, None, AttentionMask()).stream, rtol=1e-12, atol=1e-12
    )


def test_layers_without_an_encoder_leave_cross_attention_out() -> None:
    crossing = new_model({}, layer_type=LayerType.decoder)
    ids = random_ids(5)
    alone = crossing(ids, None, AttentionMask(causal=True), extras=Extras()).stream
    encoder_output = torch.randn(4, 2, HIDDEN, dtype=torch.float64)
    record = Record(attentions=[], cross_attentions=[], caches=[])
    extras = Extras(encoder_output=encoder_output, record=record)
    both = crossing(ids, None, AttentionMask(causal=True), extras=extras).stream
    assert (alone - both).abs().max() > 1e-3
    assert record.cross_attentions is not None and record.caches is not None
    assert [weights.shape for weights in record.cross_attentions] == [(2, HEADS, 5, 4)] * LAYERS
    assert [len(cache) for cache in record.caches] == [4] * LAYERS
    # From its cache, the encoder's output is not looked at again.
    again = replace(extras, encoder_output=torch.zeros_like(encoder_output), past=record.caches)
    last = crossing(random_ids(1), torch.tensor([[5]]), AttentionMask(), extras=again).stream
    ids = torch.cat((ids, random_ids(1)), dim=1)
    whole = crossing(
        ids, None, AttentionMask(causal=True), extras=replace(extras, record=Record())
    ).stream
    torch.testing.assert_close(last[0], whole[5], rtol=1e-10, atol=1e-10)


def test_the_padding_token_gets_no_gradient_from_its_look_up() -> None:
    model = new_model({}, padding_idx=7)
    ids = random_ids(6)
    ids[0, 2] = 7
    model(ids, None, AttentionMask()).stream.square().sum().backward()
    assert model.embedding is not None
    gradient = model.embedding.word_embeddings.weight.grad
    assert gradient is not None
    assert gradient[7].count_nonzero() == 0
    assert gradient[ids[0, 0]].count_nonzero() > 0


def test_given_embeddings_stand_in_place_of_the_tokens() -> None:
    model, ids = new_model({"norm_position": "post"}), random_ids(6)
    assert model.embedding is not None
    embeds = model.embedding.word_embeddings.weight[ids]
    given = model(torch.zeros_like(ids), None, AttentionMask(), extras=Extras(embeds)).stream
    torch.testing.assert_close(given, model(ids, None, AttentionMask()).stream)
