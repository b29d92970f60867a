"""Small models of both families for the tests, none of whose tensors are like another."""

from typing import Any

import torch

from megatron.hf import bert, megatron_bert
from megatron.hf.configuration import BertConfig, BertFamilyConfig, MegatronBertConfig
from megatron.hf.pretrained import PreTrainedModel

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


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
