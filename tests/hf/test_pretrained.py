"""Models from files and into them, and what users ask a model."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

from megatron.checkpoint.hugging_face.files import HuggingFaceFiles
from megatron.errors import CheckpointError, ConfigError
from megatron.hf import bert
from megatron.hf.pretrained import PreTrainedModel
from megatron.hf.saving import number_of_bytes
from tests.hf.tiny import FAMILIES, assert_same, class_of, config_of, model_of


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["5GB", 4000])
def test_what_is_saved_is_loaded(safe: bool, size: int | str, tmp_path: Path) -> None:
    model = model_of("megatron", "ForPreTraining")
    model.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size=size)
    kind = "safetensors" if safe else "bin"
    files = sorted(file.name for file in tmp_path.iterdir())
    assert all(name == "config.json" or kind in name for name in files)
    assert any("index.json" in name for name in files) is (size == 4000)
    other, info = class_of("megatron", "ForPreTraining").from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()) and not other.training
    assert_same(other.state_dict(), model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["MegatronBertForPreTraining"]
    assert config["torch_dtype"] == "float32" and model.config.architectures is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_models_read_it_whole_and_write_it_whole(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model = model_of(family, "ForPreTraining", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "ours")
    stock_class = getattr(transformers, type(model).__name__)
    stock, info = stock_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert_same(dict(stock.state_dict()), dict(model.state_dict()))
    stock.save_pretrained(tmp_path / "theirs")
    other, info = type(model).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values())
    assert_same(other.state_dict(), model.state_dict())


def test_saving_again_leaves_nothing_of_before(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("kept")
    model = model_of("bert", "Model")
    model.save_pretrained(tmp_path, max_shard_size=3000)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "pytorch_model.bin",
        "vocab.txt",
    ]


def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("bert", "Model")
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    monkeypatch.setattr(PreTrainedModel, "_to_write", lambda self: iter([torch.zeros(1)]))
    with pytest.raises(AssertionError):
        model.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("size", "expected"), [(10, 10), ("1KB", 1000), ("2.5 MB", 2500000), ("1GiB", 2**30)]
)
def test_sizes(size: int | str, expected: int) -> None:
    assert number_of_bytes(size) == expected


def test_a_size_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match="max_shard_size: found 'big'"):
        number_of_bytes("big")


def test_a_base_model_in_a_class_with_a_head_and_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = model_of("megatron", "Model")
    base.save_pretrained(tmp_path / "base")
    headed, info = class_of("megatron", "ForSequenceClassification").from_pretrained(
        tmp_path / "base", output_loading_info=True, num_labels=3
    )
    assert info["missing_keys"] == ["classifier.weight", "classifier.bias"]
    assert "classifier.weight" in caplog.text and "newly initialised" in caplog.text
    assert headed.state_dict()["classifier.weight"].shape == (3, 16)
    assert not headed.state_dict()["classifier.bias"].any()
    assert_same(headed.bert.state_dict(), base.state_dict())
    headed.save_pretrained(tmp_path / "headed")
    again, info = class_of("megatron", "Model").from_pretrained(
        tmp_path / "headed", output_loading_info=True
    )
    assert info["unexpected_keys"] == ["classifier.bias", "classifier.weight"]
    assert_same(again.state_dict(), base.state_dict())


def test_names_to_ignore(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("bert", "ForPreTraining")
    table = torch.arange(10)[None]
    torch.save(model.state_dict() | {"bert.embeddings.position_ids": table}, tmp_path / "w.bin")
    (tmp_path / "w.bin").rename(tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)

    class Quiet(bert.BertForMaskedLM):
        _keys_to_ignore_on_load_unexpected = (r"cls\.seq_relationship",)

    _, info = Quiet.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not caplog.text
    _, info = bert.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    names = ["cls.seq_relationship.bias", "cls.seq_relationship.weight"]
    assert info["unexpected_keys"] == names and names[0] in caplog.text
    assert "pooler" not in caplog.text  # a class without one has left it out on purpose


def test_other_shapes(tmp_path: Path) -> None:
    model = model_of("bert", "ForTokenClassification", num_labels=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"classifier.weight has the shape \(2, 16\)"):
        type(model).from_pretrained(tmp_path, num_labels=5)
    other, info = type(model).from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert ("classifier.bias", (2,), (5,)) in info["mismatched_keys"]
    assert other.state_dict()["classifier.weight"].shape == (5, 16)
    assert_same(other.base_model.state_dict(), model.base_model.state_dict())


def test_number_formats(tmp_path: Path) -> None:
    model = model_of("bert", "Model").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    load = type(model).from_pretrained
    assert load(tmp_path).dtype == torch.float32
    assert load(tmp_path, torch_dtype="auto").dtype == torch.bfloat16
    assert load(tmp_path, torch_dtype="float16").dtype == torch.float16
    assert load(tmp_path, dtype=torch.float64).dtype == torch.float64
    assert_same(load(tmp_path, torch_dtype="auto").state_dict(), model.state_dict())
    with pytest.raises(ConfigError, match="torch_dtype: found 'int8'"):
        load(tmp_path, torch_dtype="int8")


def test_fields_go_to_the_configuration_and_the_rest_to_the_class(tmp_path: Path) -> None:
    model_of("megatron", "Model").save_pretrained(tmp_path)
    load = class_of("megatron", "Model").from_pretrained
    model = load(tmp_path, hidden_dropout_prob=0.25, add_pooling_layer=False)
    assert model.config.hidden_dropout_prob == 0.25
    assert "pooler.dense.weight" not in model.state_dict()
    assert model.config.name_or_path == str(tmp_path)
    own = config_of("megatron", attention_probs_dropout_prob=0.5)
    assert load(tmp_path, config=own).config is own
    with pytest.raises(TypeError, match="no_such_argument"):
        load(tmp_path, no_such_argument=1)


def test_relative_positions_are_written_for_4_34_with_a_warning(tmp_path: Path) -> None:
    model = model_of("bert", "ForMaskedLM", position_embedding_type="relative_key_query")
    with pytest.warns(UserWarning, match=r"relative_key_query.*5\.x"):
        model.save_pretrained(tmp_path)
    with HuggingFaceFiles(tmp_path) as files:
        table = files.read("bert.embeddings.position_embeddings.weight")
        assert table.shape == (10, 16) and not table.any()
    other, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(other.state_dict(), model.state_dict())


def test_missing_files_are_named(tmp_path: Path) -> None:
    config_of("bert").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        class_of("bert", "Model").from_pretrained(tmp_path)


def test_an_absent_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_of("bert", "Model").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="BertModel needs safetensors, .* pip install"):
        class_of("bert", "Model").from_pretrained(tmp_path)


def test_embeddings() -> None:
    tied, untied = (
        model_of("bert", "ForMaskedLM", tie_word_embeddings=tied) for tied in (True, False)
    )
    assert tied.get_output_embeddings() is tied.get_input_embeddings()
    assert untied.get_output_embeddings() is not untied.get_input_embeddings()
    assert untied.get_output_embeddings().weight.shape == (51, 16)  # type: ignore[union-attr]
    assert model_of("bert", "Model").get_output_embeddings() is None


def test_frozen_parameters_are_not_counted_as_trainable() -> None:
    model = model_of("bert", "ForSequenceClassification")
    model.bert.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == 2 * 16 + 2 < model.num_parameters()


def test_checkpointing_reaches_the_backbone() -> None:
    model = model_of("bert", "ForMaskedLM")
    assert model.supports_gradient_checkpointing and not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.bert.is_gradient_checkpointing  # type: ignore[union-attr]
    model.gradient_checkpointing_disable()
    assert not model.bert.gradient_checkpointing  # type: ignore[union-attr]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [40, 60])
def test_another_vocabulary(size: int, tied: bool, tmp_path: Path) -> None:
    model = model_of("bert", "ForMaskedLM", tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    assert model.config.vocab_size == size
    kept = min(size, 51)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor[:kept], before[name][:kept]), name
    ids = torch.arange(5)[None]
    logits = model(ids)[0]
    assert logits.shape == (1, 5, size)
    logits.sum().backward()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(ids)[0], model.eval()(ids)[0])
    assert model.resize_token_embeddings(pad_to_multiple_of=64).weight.shape == (64, 16)  # type: ignore[union-attr]
