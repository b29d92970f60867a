"""Configurations: documented fields, files of several releases, and what is refused."""

import inspect
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron.errors import CheckpointError, ConfigError
from megatron.hf.configuration import BertConfig, BertFamilyConfig, MegatronBertConfig

FAMILIES = [
    (BertConfig, transformers.BertConfig),
    (MegatronBertConfig, transformers.MegatronBertConfig),
]
DOCUMENTED = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "position_embedding_type",
    "use_cache",
]
# What 4.34 wrote of a model of three labels, and 5.23 of one in bfloat16.
WRITTEN_BY_4 = {
    "architectures": ["MegatronBertForSequenceClassification"],
    "hidden_size": 32,
    "id2label": {"0": "no", "1": "maybe", "2": "yes"},
    "label2id": {"maybe": 1, "no": 0, "yes": 2},
    "model_type": "megatron-bert",
    "position_embedding_type": "relative_key",
    "torch_dtype": "float32",
    "transformers_version": "4.34.0",
}
WRITTEN_BY_5 = {
    "add_cross_attention": False,
    "architectures": ["MegatronBertForMaskedLM"],
    "bos_token_id": None,
    "dtype": "bfloat16",
    "hidden_size": 32,
    "is_decoder": False,
    "model_type": "megatron-bert",
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
}


@pytest.mark.parametrize(("ours", "theirs"), FAMILIES)
def test_fields_and_defaults_are_the_documented_ones(ours: type, theirs: Any) -> None:
    parameters = inspect.signature(ours).parameters
    assert list(parameters)[: len(DOCUMENTED)] == DOCUMENTED
    mine, stock = ours().to_dict(), theirs().to_dict()
    dropped = {"position_embedding_type"}  # of 5.x
    for name in set(DOCUMENTED) - dropped:
        assert mine[name] == stock[name], name
    assert mine["position_embedding_type"] == "absolute"
    for name in ("is_decoder", "add_cross_attention", "tie_word_embeddings", "id2label"):
        assert getattr(ours(), name) == getattr(theirs(), name), name


def test_megatron_bert_has_the_sizes_of_345m() -> None:
    config = MegatronBertConfig()
    sizes = (config.vocab_size, config.hidden_size, config.num_hidden_layers)
    assert sizes == (29056, 1024, 24)
    assert (config.num_attention_heads, config.intermediate_size) == (16, 4096)
    assert BertConfig().classifier_dropout is None
    assert not hasattr(config, "classifier_dropout")


def test_arguments_by_position() -> None:
    config = MegatronBertConfig(100, 64, intermediate_size=20)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (100, 64, 20)
    with pytest.raises(TypeError, match="multiple values"):
        MegatronBertConfig(100, vocab_size=100)


@pytest.mark.parametrize(("ours", "theirs"), FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_what_either_side_writes_the_other_reads(
    ours: type[BertFamilyConfig], theirs: Any, seed: int, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    fields = {
        "vocab_size": draw.randint(10, 99),
        "hidden_size": draw.choice([16, 32]),
        "num_attention_heads": draw.choice([2, 4]),
        "hidden_act": draw.choice(["gelu", "relu", "gelu_new"]),
        "hidden_dropout_prob": draw.random(),
        "layer_norm_eps": draw.choice([1e-12, 1e-5]),
        "tie_word_embeddings": draw.random() < 0.5,
        "is_decoder": draw.random() < 0.5,
        "num_labels": draw.randint(1, 5),
        "problem_type": draw.choice([None, "regression"]),
        "something_of_mine": draw.randint(0, 9),
    }
    ours(**fields, torch_dtype="float16").save_pretrained(tmp_path / "ours")
    stock = theirs.from_pretrained(tmp_path / "ours")
    theirs(**fields, dtype="float16").save_pretrained(tmp_path / "theirs")
    mine = ours.from_pretrained(tmp_path / "theirs")
    for name, value in fields.items():
        assert getattr(stock, name) == getattr(mine, name) == value, name
    assert mine.torch_dtype == stock.dtype == torch.float16


def test_files_of_old_and_new_releases() -> None:
    old, new = MegatronBertConfig(**WRITTEN_BY_4), MegatronBertConfig.from_dict(WRITTEN_BY_5)
    assert (old.num_labels, old.id2label) == (3, {0: "no", 1: "maybe", 2: "yes"})
    assert old.torch_dtype == torch.float32 and new.torch_dtype == new.dtype == torch.bfloat16
    assert old.position_embedding_type == "relative_key"
    assert old.architectures == WRITTEN_BY_4["architectures"]
    written = json.loads(old.to_json_string())
    assert WRITTEN_BY_4.items() <= written.items()
    assert json.loads(new.to_json_string())["torch_dtype"] == "bfloat16"


def test_a_file_is_what_is_read_back(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=7, num_labels=3, classifier_dropout=0.5, of_mine={"a": [1]})
    config.save_pretrained(tmp_path / "new" / "place")
    again = BertConfig.from_pretrained(tmp_path / "new" / "place")
    again.name_or_path = config.name_or_path
    assert again == config and again.of_mine == {"a": [1]}
    assert BertConfig.from_json_file(tmp_path / "new" / "place" / "config.json") == config
    again.vocab_size = 8
    assert again != config


def test_labels_stay_together() -> None:
    config = BertConfig(num_labels=4)
    assert config.id2label == {n: f"LABEL_{n}" for n in range(4)}
    config.num_labels = 1
    assert (config.id2label, config.label2id) == ({0: "LABEL_0"}, {"LABEL_0": 0})
    assert BertConfig(id2label={"0": "a", "1": "b", "2": "c"}).label2id == {"a": 0, "b": 1, "c": 2}
    assert BertConfig(label2id={"a": 1, "b": 0}).id2label == {1: "a", 0: "b"}


def test_names_of_labels_outweigh_their_number(caplog: pytest.LogCaptureFixture) -> None:
    config = BertConfig(num_labels=3, id2label={0: "only"})
    assert config.num_labels == 1
    assert "num_labels=3" in caplog.text


def test_overrides_set_fields_and_the_others_are_handed_back() -> None:
    config, unused = BertConfig.from_dict(
        WRITTEN_BY_4 | {"model_type": "bert"},
        return_unused_kwargs=True,
        num_labels=5,
        hidden_size=64,
        add_pooling_layer=False,
    )
    assert (config.num_labels, config.hidden_size) == (5, 64)
    assert unused == {"add_pooling_layer": False}


def test_a_configuration_of_another_family_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert BertConfig.from_dict(WRITTEN_BY_5).model_type == "bert"
    assert "megatron-bert" in caplog.text


def test_defaults_are_not_shared() -> None:
    labels = {0: "a"}
    config = BertConfig(id2label=labels)
    assert config.id2label is not None
    config.id2label[1] = "b"
    assert labels == {0: "a"} and BertConfig().num_labels == 2


def test_returning_tuples_is_a_field() -> None:
    assert BertConfig().use_return_dict
    assert not BertConfig(return_dict=False).use_return_dict


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"problem_type": "guessing"}, "problem_type: found 'guessing'"),
        ({"torch_dtype": "float31"}, "torch_dtype: found 'float31'"),
    ],
)
def test_what_no_model_has_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BertConfig(**fields)


def test_what_cannot_be_built_is_named() -> None:
    config = BertConfig(add_cross_attention=True, pad_token_id=40000)
    with pytest.raises(ValueError, match="add_cross_attention.*\n?.*") as caught:
        config.check()
    assert "pad_token_id: 40000" in str(caught.value)
    BertConfig().check()


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json"):
        BertConfig.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json is missing"):
        BertConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        BertConfig.from_pretrained(tmp_path / "nowhere")
