"""A network run layer by layer from a source computes what the whole network computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.conversion.certificate import fixed_input
from megatron.conversion.network import HIDDEN, MASKED_LM, NEXT_SENTENCE, NEXT_TOKEN, run_network
from megatron.errors import CheckpointError
from tests.conversion.support import (
    BERT,
    GPT,
    LLAMA,
    POST_BERT,
    T5,
    T5_OF_HF,
    VOCABULARY,
    stored,
    without,
)

KINDS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "one layer": BERT | {"num_layers": 1},
    "without binary head": BERT | {"bert_no_binary_head": True},
    "post": POST_BERT,
    "distances": BERT | {"position_embedding_type": "relative_key_query"},
    "untied": BERT | {"untie_embeddings_and_output_weights": True, "num_tokentypes": 1},
    "gpt": GPT,
    "llama": LLAMA,
    "t5": T5,
    "t5 of hugging face": T5_OF_HF,
    "bf16": GPT | {"bf16": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_layer_by_layer_is_the_whole(kind: str) -> None:
    model, network = stored(**KINDS[kind])
    inputs = fixed_input(model.model)
    found = run_network(model.model, model.source, inputs)

    whole = getattr(network, "module", network).float()
    ids, real = inputs["input_ids"], inputs.get("attention_mask")
    with torch.no_grad():
        if model.model.model_type == "gpt":
            expected = {NEXT_TOKEN: whole(ids)}
        elif model.model.model_type == "t5":
            expected = {NEXT_TOKEN: whole(ids, inputs["decoder_input_ids"], real.bool())}
        else:
            masked_lm, next_sentence = whole(ids, real.bool(), inputs["token_type_ids"])
            expected = {MASKED_LM: masked_lm}
            if next_sentence is not None:
                expected[NEXT_SENTENCE] = next_sentence
    assert {name for name in found if name not in (HIDDEN, "pooled")} == set(expected)
    for name, logits in expected.items():
        assert found[name].shape[-1] == (2 if name == NEXT_SENTENCE else VOCABULARY)
        # Padded rows change how a product is cut, and with it its rounding.
        difference = found[name] - logits[..., : found[name].size(-1)]
        assert difference.abs().max() < 1e-4, name


def test_no_more_than_a_layer_is_in_memory() -> None:
    model, _ = stored(**GPT | {"num_layers": 9, "hidden_size": 32})
    run_network(model.model, model.source, fixed_input(model.model))
    layer = sum(
        model.source.read(name).nbytes for name in model.source.shapes if ".layers.4." in name
    )
    ends = sum(
        model.source.read(name).nbytes for name in model.source.shapes if "embedding" in name
    )
    # The last of the tensors just counted may be alive still.
    assert model.source.most_live_bytes <= layer + ends
    assert model.num_bytes > 5 * (layer + ends)


@pytest.mark.parametrize("gone", [("lm_head",), ("binary_head",), ("lm_head", "binary_head")])
def test_heads_that_are_not_there_are_not_computed(gone: tuple[str, ...]) -> None:
    model, _ = stored(**BERT)
    inputs = fixed_input(model.model)
    whole = run_network(model.model, model.source, inputs)
    without(model.source, *gone)
    found = run_network(model.model, model.source, inputs)
    heads = {"lm_head": MASKED_LM, "binary_head": NEXT_SENTENCE}
    assert set(whole) - set(found) == {heads[name] for name in gone}
    assert all(torch.equal(found[name], whole[name]) for name in found)


def test_a_missing_tensor_is_named() -> None:
    model, _ = stored(**GPT)
    without(model.source, "language_model.encoder.layers.1.mlp.dense_h_to_4h.bias")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.dense_h_to_4h\.bias is missing"):
        run_network(model.model, model.source, fixed_input(model.model))
