"""Initial values: which they are, what decides them, and that ranks do not."""

from typing import Any

import pytest
import torch

from megatron.errors import ConfigError
from megatron.hf.parallel import parallel_state
from tests.distributed import distributed
from tests.hf.tiny import FAMILIES, assert_same, class_of, config_of


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
