"""What a model's tensors are called, and how they go to stock models and come back."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from megatron.hf import megatron_bert
from megatron.hf.configuration import BertFamilyConfig, MegatronBertConfig
from tests.hf.tiny import FAMILIES, assert_same, config_of, model_of

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


def stock_of(family: str, head: str, config: BertFamilyConfig) -> nn.Module:
    name = FAMILIES[family][1]
    fields = config.to_dict()
    fields.pop("position_embedding_type")
    return getattr(transformers, name + head)(getattr(transformers, name + "Config")(**fields))


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
    embeddings = model.get_input_embeddings()
    assert embeddings is not None and isinstance(embeddings.weight, torch.Tensor)
    assert table.data_ptr() == embeddings.weight.data_ptr()
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


def test_copies_are_models_of_their_own() -> None:
    model = model_of("bert", "ForNextSentencePrediction").eval()
    other = copy.deepcopy(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 51, (2, 5))
    for each in (model, other):
        each(ids)[0].sum().backward()
    assert_same(other.gradients(), model.gradients())
    keys = other.gradients()["bert.encoder.layer.0.attention.self.key.bias"]
    assert not keys.any()  # which a hook on the parameter sees to
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same(dict(model.state_dict()), before)


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
