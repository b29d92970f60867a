"""Models by name: what they are called, where their values come from, how they are saved."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from megatron.checkpoint.hf_files import HuggingFaceFiles
from megatron.errors import CheckpointError, ConfigError
from megatron.hf import bert, megatron_bert
from megatron.hf.configuration import BertConfig, BertFamilyConfig, MegatronBertConfig
from megatron.hf.parallel import parallel_state
from megatron.hf.pretrained import PreTrainedModel
from megatron.hf.saving import number_of_bytes
from megatron.hf.tf_weights import TensorFlowCheckpoint, hugging_face_name
from megatron.mpu import ParallelState
from tests.distributed import distributed, run_distributed

SIZES: dict[str, Any] = {
    "vocab_size": 51,  # not divisible by any number of tensor ranks
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 10,
    "pad_token_id": 7,
}
FAMILIES = {"bert": (bert, "Bert"), "megatron": (megatron_bert, "MegatronBert")}
HEADS = [
    "Model",
    "ForPreTraining",
    "ForMaskedLM",
    "ForNextSentencePrediction",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForMultipleChoice",
    "ForQuestionAnswering",
]


def class_of(family: str, head: str) -> type[PreTrainedModel]:
    module, name = FAMILIES[family]
    found = getattr(module, name + head)
    assert issubclass(found, PreTrainedModel)
    return found


def config_of(family: str, **fields: Any) -> BertFamilyConfig:
    cls = BertConfig if family == "bert" else MegatronBertConfig
    return cls(**{**SIZES, **fields})


def model_of(family: str, head: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = class_of(family, head)(config_of(family, **fields))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms, too, are told apart
            parameter.copy_(torch.randn(parameter.shape))
    return model


def stock_of(family: str, head: str, config: BertFamilyConfig) -> nn.Module:
    name = FAMILIES[family][1]
    fields = config.to_dict()
    fields.pop("position_embedding_type")
    return getattr(transformers, name + head)(getattr(transformers, name + "Config")(**fields))


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_state_dicts_go_to_stock_models_and_back(family: str, head: str) -> None:
    model = model_of(family, head)
    stock = stock_of(family, head, model.config)
    stock.load_state_dict(model.state_dict(), strict=True)
    other = model_of(family, head, seed=1)
    assert str(other.load_state_dict(stock.state_dict())) == "<All keys matched successfully>"
    assert_same(other.state_dict(), model.state_dict())
    assert other.num_parameters() == stock.num_parameters()  # type: ignore[operator]


def test_an_output_layer_of_its_own_has_its_names() -> None:
    model = model_of("megatron", "ForMaskedLM", tie_word_embeddings=False)
    stock = stock_of("megatron", "ForMaskedLM", model.config)
    stock.load_state_dict(model.state_dict(), strict=True)
    names = ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")
    first, second = (model.state_dict()[name] for name in names)
    assert not torch.equal(first, second)


def test_decoders_with_cross_attention() -> None:
    for family in FAMILIES:
        name = "LMHeadModel" if family == "bert" else "ForCausalLM"
        model = model_of(family, name, is_decoder=True, add_cross_attention=True)
        stock_of(family, name, model.config).load_state_dict(model.state_dict(), strict=True)


def test_what_is_renamed_shares_its_memory() -> None:
    model = model_of("bert", "ForPreTraining")
    table = model.state_dict()["bert.embeddings.word_embeddings.weight"]
    weight = model.get_input_embeddings().weight  # type: ignore[union-attr]
    assert table.data_ptr() == weight.data_ptr()  # type: ignore[union-attr, operator]
    assert not table.requires_grad
    kept = model.state_dict(keep_vars=True)["bert.embeddings.word_embeddings.weight"]
    assert kept.requires_grad


def test_a_prefix_and_a_destination() -> None:
    model = model_of("bert", "Model")
    given = {"other": 1}
    found = model.state_dict(destination=given, prefix="module.")
    assert found is given and "module.embeddings.word_embeddings.weight" in found


def test_a_tied_tensor_is_enough_under_one_name() -> None:
    model = model_of("bert", "ForPreTraining")
    whole, other = model.state_dict(), model_of("bert", "ForPreTraining", seed=1)
    for absent in (
        {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"},
        {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"},
    ):
        other.load_state_dict({name: whole[name] for name in whole if name not in absent})
        assert_same(other.state_dict(), whole)


def test_mismatches_of_a_state_dict_are_said_as_torch_says_them() -> None:
    model = model_of("bert", "ForSequenceClassification")
    given = model.state_dict() | {"bert.embeddings.position_ids": torch.arange(10)}
    del given["classifier.bias"]
    given["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="BertForSequenceClassification") as caught:
        model.load_state_dict(given)
    assert 'Missing key(s) in state_dict: "classifier.bias"' in str(caught.value)
    assert 'Unexpected key(s) in state_dict: "extra". ' in str(caught.value)
    missing, unexpected = model.load_state_dict(given, strict=False)
    assert (missing, unexpected) == (["classifier.bias"], ["extra"])
    given["classifier.weight"] = torch.zeros(5, 16)
    with pytest.raises(RuntimeError, match="size mismatch for classifier.weight"):
        model.load_state_dict(given, strict=False)


def test_gradients_by_name() -> None:
    model = model_of("megatron", "ForNextSentencePrediction")
    assert model.gradients() == {}
    model(torch.randint(0, 51, (2, 5)))[0].sum().backward()
    gradients = model.gradients()
    assert gradients.keys() == model.state_dict().keys()
    assert gradients["bert.pooler.dense.weight"].abs().sum() > 0
    assert_same(gradients, model.full_state_dict(gradients=True))


class Tagger(megatron_bert.MegatronBertPreTrainedModel):
    """What a user would write: a base model and layers of PyTorch's own."""

    def __init__(self, config: MegatronBertConfig) -> None:
        super().__init__(config)
        self.bert = megatron_bert.MegatronBertModel(config, add_pooling_layer=False)
        self.tags = nn.Linear(config.hidden_size, 3)
        self.post_init()


def test_a_class_of_a_users_own(tmp_path: Path) -> None:
    config = config_of("megatron", initializer_range=0.5)
    model = Tagger(config)  # type: ignore[arg-type]
    assert 0.3 < float(model.tags.weight.detach().std()) < 0.7 and not model.tags.bias.any()
    with torch.no_grad():
        model.tags.bias.fill_(2.0)
    model.save_pretrained(tmp_path)
    other, info = Tagger.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(other.state_dict(), model.state_dict())
    assert float(other.tags.bias.detach().sum()) == 6.0


# --- initial values ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_values(family: str) -> None:
    torch.manual_seed(1)
    config = config_of(family, initializer_range=0.3, vocab_size=1000)
    model = class_of(family, "ForPreTraining")(config)
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1 and tensor.numel() > 100:
            assert 0.2 < float(tensor.std()) < 0.4, name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        elif tensor.dim() == 1:
            assert bool((tensor == 1).all()), name
    row = model.state_dict()["bert.embeddings.word_embeddings.weight"][7]
    assert bool(row.any()) is (family == "megatron")


def test_the_seed_of_torch_decides() -> None:
    def made(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return class_of("bert", "ForMaskedLM")(config_of("bert")).state_dict()

    assert_same(made(3), made(3))
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(made(3)[name], made(4)[name])


def test_what_cannot_be_built_is_refused() -> None:
    for fields, name in (
        ({"hidden_size": 18}, "num_attention_heads"),
        ({"hidden_act": "no_such"}, "hidden_act"),
        ({"position_embedding_type": "sideways"}, "position_embedding_type"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"pruned_heads": {0: [1]}}, "pruned_heads"),
    ):
        with pytest.raises(ValueError, match=name):
            class_of("bert", "Model")(config_of("bert", **fields))


# --- files -------------------------------------------------------------------------------------


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
        _keys_to_ignore_on_load_unexpected = (r"pooler", r"cls\.seq_relationship")

    _, info = Quiet.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not caplog.text
    _, info = bert.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["unexpected_keys"]) == 4 and "bert.pooler.dense.weight" in caplog.text


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
    assert_same(other.bert.state_dict(), model.bert.state_dict())  # type: ignore[operator, union-attr]


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


# --- TensorFlow --------------------------------------------------------------------------------


VARIABLES = {
    "bert/embeddings/word_embeddings": "bert.embeddings.word_embeddings.weight",
    "bert/embeddings/token_type_embeddings": "bert.embeddings.token_type_embeddings.weight",
    "bert/embeddings/LayerNorm/gamma": "bert.embeddings.LayerNorm.weight",
    "bert/encoder/layer_11/attention/self/query/kernel": (
        "bert.encoder.layer.11.attention.self.query.weight"
    ),
    "bert/encoder/layer_0/output/LayerNorm/beta": "bert.encoder.layer.0.output.LayerNorm.bias",
    "bert/pooler/dense/bias": "bert.pooler.dense.bias",
    "cls/predictions/transform/dense/kernel": "cls.predictions.transform.dense.weight",
    "cls/predictions/output_bias": "cls.predictions.bias",
    "cls/seq_relationship/output_weights": "cls.seq_relationship.weight",
    "output_weights": "classifier.weight",
    "cls/squad/output_bias": "qa_outputs.bias",
    "bert/pooler/dense/kernel/adam_m": None,
    "bert/pooler/dense/kernel/AdamWeightDecayOptimizer_1": None,
    "global_step": None,
}


@pytest.mark.parametrize("variable", VARIABLES)
def test_names_of_variables(variable: str) -> None:
    assert hugging_face_name(variable) == VARIABLES[variable]


class Variables:
    """What stands for TensorFlow's reader: a model's tensors as those programs stored them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.values: dict[str, np.ndarray[Any, Any]] = {"global_step": np.array(3)}
        for name, tensor in tensors.items():
            if "decoder" in name:
                continue
            if name == "cls.predictions.bias":
                variable = "cls/predictions/output_bias"
            elif name.startswith("cls.seq_relationship"):
                last = "output_weights" if "weight" in name else "output_bias"
                variable = f"cls/seq_relationship/{last}"
            else:
                variable = name.replace(".layer.", ".layer_").replace(".", "/")
                if "LayerNorm" in name:
                    variable = variable.replace("weight", "gamma").replace("bias", "beta")
                elif "_embeddings" in name:
                    variable = variable.removesuffix("/weight")
                elif name.endswith("weight"):
                    variable, tensor = variable.replace("weight", "kernel"), tensor.t()
            self.values[variable] = tensor.numpy()

    def get_variable_to_shape_map(self) -> dict[str, list[int]]:
        return {name: list(value.shape) for name, value in self.values.items()}

    def get_tensor(self, name: str) -> np.ndarray[Any, Any]:
        return self.values[name]


def test_a_checkpoint_of_the_original_programs() -> None:
    model, other = (model_of("bert", "ForPreTraining", seed) for seed in (0, 1))
    info = other.load_tensors(TensorFlowCheckpoint(Variables(model.state_dict())))
    assert not any(info.values())
    assert_same(other.state_dict(), model.state_dict())


def test_a_checkpoint_of_something_else_is_refused() -> None:
    with pytest.raises(CheckpointError, match="word_embeddings"):
        TensorFlowCheckpoint(Variables({}))


def test_tensorflow_is_asked_for_when_it_is_used(tmp_path: Path) -> None:
    config = config_of("bert")
    with pytest.raises(ImportError, match="BertForMaskedLM needs tensorflow"):
        bert.BertForMaskedLM.from_pretrained(tmp_path, config=config, from_tf=True)
    model = model_of("bert", "ForMaskedLM")
    with pytest.raises(ImportError, match="BertForMaskedLM needs tensorflow"):
        model.load_tf_weights(model.config, tmp_path)


# --- what users ask a model --------------------------------------------------------------------


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
    model.bert.requires_grad_(False)  # type: ignore[operator, union-attr]
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


# --- several ranks -----------------------------------------------------------------------------


def spread_over_four(
    directory: Path, family: str, read: list[str] | None = None
) -> PreTrainedModel:
    return class_of(family, "ForPreTraining").from_pretrained(
        directory, tensor_model_parallel_size=2, pipeline_model_parallel_size=2
    )


def load_save_and_look(directory: str, family: str) -> tuple[set[str], set[str]]:
    """On four ranks: everything that is whole again equals what one process has."""
    path, read = Path(directory), set[str]()
    stock_read = HuggingFaceFiles.read

    def counted(self: HuggingFaceFiles, name: str) -> torch.Tensor:
        read.add(name)
        return stock_read(self, name)

    HuggingFaceFiles.read = counted  # type: ignore[method-assign]
    try:
        model = class_of(family, "ForPreTraining").from_pretrained(
            path, tensor_model_parallel_size=2, pipeline_model_parallel_size=2
        )
    finally:
        HuggingFaceFiles.read = stock_read  # type: ignore[method-assign]
    alone = type(model).from_pretrained(path, parallel_state=ParallelState.single())
    assert_same(model.full_state_dict(), dict(alone.state_dict()))
    assert model.num_parameters() == alone.num_parameters()
    model.save_pretrained(path / "again", max_shard_size=5000)
    model.save_pretrained(path / "old", safe_serialization=False)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(own)
    assert_same(model.full_state_dict(), dict(alone.state_dict()))
    return read, set(own)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_ranks_load_and_save_what_one_does(family: str, tmp_path: Path) -> None:
    model = model_of(family, "ForPreTraining")
    model.save_pretrained(tmp_path)
    results = run_distributed(4, load_save_and_look, str(tmp_path), family)
    for again in ("again", "old"):
        loaded = type(model).from_pretrained(tmp_path / again)
        assert_same(loaded.state_dict(), model.state_dict())
    names = set(model.state_dict())
    (first_read, first_own), (last_read, last_own) = results[0], results[2]
    assert first_own | last_own == names and first_own.isdisjoint(last_own)
    # A stage reads what it holds; the last one's copy of the word embedding is read, too.
    assert first_read == first_own
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert last_read == last_own - tied | {"bert.embeddings.word_embeddings.weight"}


@distributed(4)
def made_on_four_ranks(family: str, fields: dict[str, Any]) -> None:
    torch.manual_seed(torch.distributed.get_rank())  # rank 0's seed counts for all
    made = class_of(family, "ForMaskedLM")(
        config_of(family, **fields), parallel_state=parallel_state(2, 2)
    )
    torch.manual_seed(0)
    alone = class_of(family, "ForMaskedLM")(config_of(family, **fields))
    assert_same(made.full_state_dict(), alone.full_state_dict())
    with pytest.raises(ConfigError, match="4 ranks"):
        made.resize_token_embeddings(60)


@pytest.mark.parametrize("tied", [True, False])
def test_initial_values_do_not_depend_on_the_ranks(tied: bool) -> None:
    made_on_four_ranks("bert", {"tie_word_embeddings": tied, "pad_token_id": 30})


def missing_on_two_ranks(directory: str) -> list[str]:
    torch.manual_seed(torch.distributed.get_rank())
    model, info = class_of("bert", "ForSequenceClassification").from_pretrained(
        Path(directory), pipeline_model_parallel_size=2, output_loading_info=True
    )
    weight = model.full_state_dict()["classifier.weight"]
    assert weight.any()
    return info["missing_keys"]


def test_what_is_missing_is_said_alike_on_all_ranks(tmp_path: Path) -> None:
    model_of("bert", "Model").save_pretrained(tmp_path)
    results = run_distributed(2, missing_on_two_ranks, str(tmp_path))
    assert results == [["classifier.weight", "classifier.bias"]] * 2
