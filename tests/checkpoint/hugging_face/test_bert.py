"""The map between our BERT and Hugging Face's two, against the classes it is made for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron.checkpoint.hugging_face.bert import bert_entries
from megatron.checkpoint.hugging_face.models import (
    ARCHITECTURES,
    hugging_face_config,
    model_config_of,
    open_hugging_face,
)
from megatron.checkpoint.name_map import to_ours, to_theirs
from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from tests.checkpoint.hugging_face.support import (
    LENGTH,
    TOLERANCE,
    DictSource,
    difference,
    ours_from,
    random_tensors,
    state_of,
    theirs_randomised,
    tokens,
)

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
KINDS = {"MegatronBert": "pre", "Bert": "post"}
# For each class its heads, and whether it pools.
CLASSES: dict[str, tuple[tuple[str, ...], bool]] = {
    "Model": ((), True),
    "ForMaskedLM": (("lm",), False),
    "ForPreTraining": (("lm", "nsp"), True),
    "ForNextSentencePrediction": (("nsp",), True),
    "ForSequenceClassification": (("classifier",), True),
    "ForMultipleChoice": (("classifier",), True),
    "ForTokenClassification": (("classifier",), False),
    "ForQuestionAnswering": (("qa",), False),
}
TIED = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}


def our_config(norm_position: str = "pre", **changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "max_position_embeddings": 12,
        "vocab_size": VOCABULARY,
    }
    return ModelConfig(**(sizes | {"norm_position": norm_position} | changes))


def their_model(kind: str, name: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    return theirs_randomised(getattr(transformers, kind + name)(config))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_every_class(kind: str, name: str) -> None:
    network = their_model(kind, name)
    heads, pooler = CLASSES[name]
    prefix = "bert." if heads else ""
    model = model_config_of(network.config.to_dict())
    entries = bert_entries(model, heads=heads, pooler=pooler, prefix=prefix)
    state = state_of(network)
    assert {their for entry in entries for their in entry.theirs} == state.keys()
    for entry in entries:
        shapes = [tuple(state[their].shape) for their in entry.theirs]
        assert list(entry.shapes(entry.shape(shapes))) == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_cross_attention(kind: str) -> None:
    network = their_model(kind, "ForMaskedLM", is_decoder=True, add_cross_attention=True)
    model = our_config(KINDS[kind], ffn_hidden_size=24)
    entries = bert_entries(model, heads=("lm",), decoder=True, pooler=False)
    state = state_of(network)
    assert {their for entry in entries for their in entry.theirs} == state.keys()
    ours = dict(to_ours(entries, state.__getitem__))
    assert ours["language_model.encoder.layers.1.inter_attention.key_value.weight"].shape == (
        2 * 16,
        16,
    )
    back = dict(to_theirs(entries, ours.__getitem__))
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_named_as_version_4_names_them(kind: str) -> None:
    """Version 5 has none. There, BERT's cross attention never had any."""
    model = our_config(KINDS[kind], position_embedding_type="relative_key")
    plain = our_config(KINDS[kind])
    crossing = kind == "MegatronBert"

    def names(config: ModelConfig, *, distances: bool) -> set[str]:
        found = bert_entries(config, heads=(), decoder=True, cross_distances=distances)
        return {their for entry in found for their in entry.theirs}

    attentions = ["attention", "crossattention"] if crossing else ["attention"]
    expected = {
        f"bert.encoder.layer.{layer}.{attention}.self.distance_embedding.weight"
        for layer in range(2)
        for attention in attentions
    }
    absent = {"bert.embeddings.position_embeddings.weight"}
    assert names(model, distances=crossing) == names(plain, distances=False) - absent | expected


@pytest.mark.parametrize("changes", [{}, {"bert_no_binary_head": True}])
@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("positions", ["learned_absolute", "relative_key_query"])
def test_every_tensor_of_ours_is_mapped(
    norm_position: str, positions: str, untied: bool, changes: dict[str, bool]
) -> None:
    model = our_config(
        norm_position,
        position_embedding_type=positions,
        untie_embeddings_and_output_weights=untied,
        **changes,
    )
    architecture = ARCHITECTURES["bert" if norm_position == "post" else "megatron-bert"]
    entries = architecture.entries(model)
    ours = random_tensors(model)
    assert {entry.ours for entry in entries} == ours.keys()
    theirs = dict(to_theirs(entries, ours.__getitem__))
    back = dict(to_ours(entries, theirs.__getitem__))
    assert all(torch.equal(back[name], ours[name]) for name in ours)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
        {"hidden_act": "silu", "type_vocab_size": 3},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_theirs(kind: str, changes: dict[str, Any]) -> None:
    network = their_model(kind, "ForPreTraining", **changes)
    ours = ours_from(network)
    ids, real = tokens(VOCABULARY), torch.ones(2, LENGTH, dtype=torch.long)
    real[1, 6:] = 0
    types = (torch.arange(LENGTH) >= 5).long().expand(2, LENGTH)
    theirs = network(ids, attention_mask=real, token_type_ids=types)
    masked_lm, next_sentence = ours(ids, real.bool(), types)
    assert difference(masked_lm, theirs.prediction_logits) < TOLERANCE
    assert difference(next_sentence, theirs.seq_relationship_logits) < TOLERANCE


CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"position_embedding_type": "relative_key", "num_tokentypes": 5},
    {"position_embedding_type": "relative_key_query", "layernorm_epsilon": 1e-12},
    {"activation": "gelu_tanh", "ffn_hidden_size": 40, "hidden_dropout": 0.0},
    {"untie_embeddings_and_output_weights": True, "attention_dropout": 0.25},
    {"bert_no_binary_head": True, "init_method_std": 0.5, "activation": "quick_gelu"},
]


@pytest.mark.parametrize("changes", CONFIGURATIONS)
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_configuration_returns(norm_position: str, changes: dict[str, Any]) -> None:
    model = our_config(norm_position, **changes)
    names = random_tensors(model)
    architecture = ARCHITECTURES["bert" if norm_position == "post" else "megatron-bert"]
    written = architecture.to_write(model, names)
    hf = hugging_face_config(model, dtype=torch.float32, class_name=written.class_name)
    again = model_config_of(hf)
    assert dataclasses.replace(again, ffn_hidden_size=model.ffn_hidden_size) == model
    assert again.ffn_size == model.ffn_size


def test_early_names_and_unused_tensors_are_understood() -> None:
    """Early files say gamma and beta, keep buffers, and hold what is tied twice."""
    network = their_model("Bert", "ForPreTraining")
    state = state_of(network)
    early = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in state.items()
    }
    early |= dict.fromkeys(TIED, torch.zeros(1))
    early["bert.embeddings.position_ids"] = torch.arange(12)
    opened = open_hugging_face(network.config.to_dict(), DictSource(early))
    plain = open_hugging_face(network.config.to_dict(), DictSource(state))
    assert opened.tensors.shapes == plain.tensors.shapes
    for name in plain.tensors.shapes:
        assert torch.equal(opened.tensors.read(name), plain.tensors.read(name))


def test_the_heads_are_those_of_the_files() -> None:
    network = their_model("MegatronBert", "ForSequenceClassification")
    opened = open_hugging_face(network.config.to_dict(), DictSource(state_of(network)))
    assert {"classifier.weight", "language_model.pooler.dense.bias"} <= opened.tensors.shapes.keys()
    assert opened.model.bert_no_binary_head
    assert opened.notes == ("there is no masked-LM head in these files",)


def test_distances_leave_a_table_of_positions_unused() -> None:
    model = our_config(position_embedding_type="relative_key")
    architecture = ARCHITECTURES["megatron-bert"]
    ours = random_tensors(model)
    written = architecture.to_write(model, ours)
    table = "bert.embeddings.position_embeddings.weight"
    assert written.zeros == {table: (12, 16)}
    assert any("transformers 4" in note for note in written.notes)
    theirs = dict(to_theirs(written.entries, ours.__getitem__)) | {table: torch.ones(12, 16)}
    hf = hugging_face_config(model, dtype=torch.float32)
    assert open_hugging_face(hf, DictSource(theirs)).tensors.shapes.keys() == ours.keys()


def test_one_activation_for_two_is_a_note() -> None:
    """Megatron-LM's fused MLP is the tanh form, its head the erf form."""
    model = our_config(activation="gelu_tanh", head_activation="gelu")
    written = ARCHITECTURES["megatron-bert"].to_write(model, random_tensors(model))
    assert hugging_face_config(model, dtype=torch.float32)["hidden_act"] == "gelu_new"
    (note,) = written.notes
    assert "hidden_act gelu_new is the MLP's" in note and "trained with gelu," in note


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kv_channels": 8}, "--kv-channels 8"),
        ({"num_query_groups": 2}, "--num-query-groups 2"),
        ({"normalization": "RMSNorm"}, "--normalization RMSNorm"),
        ({"swiglu": True}, "--swiglu True"),
        ({"geglu": True}, "--geglu True"),
        ({"disable_bias_linear": True}, "--disable-bias-linear True"),
        ({"position_embedding_type": "rope"}, "--position-embedding-type rope"),
        ({"attention_scale": 0.7}, "--attention-scale 0.7"),
        ({"num_tokentypes": 0}, "--num-tokentypes 0"),
        (
            {"apply_residual_connection_post_layernorm": True},
            "--apply-residual-connection-post-layernorm True",
        ),
    ],
)
def test_what_theirs_cannot_express_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        hugging_face_config(our_config(**changes), dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_act": "hardswish"}, "hidden_act is 'hardswish', expected one of gelu, "),
        ({"hidden_size": 18}, "num_attention_heads is 4, expected a divisor of hidden_size 18"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps is -1.0"),
        ({"hidden_dropout_prob": 1}, "hidden_dropout_prob is 1, expected a number in"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type is 'rotary'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is"),
    ],
)
def test_what_ours_cannot_express_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        model_config_of({"model_type": "bert", **SIZES, **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"is_decoder": True}, "is_decoder is True, expected False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
    ],
)
def test_files_of_other_models_are_refused(changes: dict[str, Any], problem: str) -> None:
    network = their_model("Bert", "ForMaskedLM")
    hf = network.config.to_dict() | changes
    with pytest.raises(CheckpointError, match=problem):
        open_hugging_face(hf, DictSource(state_of(network)))


def test_tensors_missing_or_not_known_are_named() -> None:
    network = their_model("Bert", "ForMaskedLM")
    state = state_of(network)
    del state["bert.encoder.layer.1.output.dense.bias"]
    state["bert.adapter.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        open_hugging_face(network.config.to_dict(), DictSource(state))
    assert error.value.problems == (
        "1 tensors of the bert are missing: bert.encoder.layer.1.output.dense.bias",
        "1 tensors of the bert are not known: bert.adapter.weight",
    )


def test_heads_that_no_class_has_together_are_refused() -> None:
    model = our_config()
    names = set(random_tensors(model)) | {"qa_outputs.weight", "qa_outputs.bias"}
    with pytest.raises(CheckpointError, match="no class of MegatronBert has lm and nsp and qa"):
        ARCHITECTURES["megatron-bert"].to_write(model, names)
