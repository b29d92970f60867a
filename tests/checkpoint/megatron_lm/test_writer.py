"""What is written lies where Megatron-LM looks for it; what it cannot express is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.megatron_lm import write_megatron
from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from tests.checkpoint.megatron_lm import by_hand
from tests.checkpoint.megatron_lm.support import Tensors, make_model, random_tensors


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """The tensors of nested dictionaries, and the keys that lead to each."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))


def assert_written(directory: Path, expected: by_hand.Files) -> None:
    """Hold the files of all ranks against those made by hand, padding of the vocabulary aside."""
    for p, row in enumerate(expected):
        for t, by_loops in enumerate(row):
            rank = f"mp_rank_{t:02d}" if len(expected) == 1 else f"mp_rank_{t:02d}_{p:03d}"
            written = torch.load(directory / rank / "model_optim_rng.pt", weights_only=False)
            found, wanted = dict(leaves(written)), dict(leaves(by_loops))
            assert found.keys() == wanted.keys()
            size = by_hand.PADDED // len(row)
            real = max(0, min(size, by_hand.VOCAB - t * size))
            for path, tensor in wanted.items():
                is_padded = "word_embeddings" in str(path) or path[-2:] in (
                    ("lm_head", "bias"),
                    ("output_layer", "weight"),
                )
                rows = real if is_padded else len(tensor)
                assert found[path].shape == tensor.shape, path
                assert torch.equal(found[path][:rows], tensor[:rows]), path


@pytest.mark.parametrize("version", [0, 1, 2, 3])
@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (2, 2)])
def test_bert_as_by_hand(version: int, pipeline: int, virtual: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    split: dict[str, Any] = {"tensor": 2, "pipeline": pipeline, "virtual": virtual}
    ours, files = by_hand.bert(version, **split)
    model = make_model(
        num_layers=4,
        hidden_size=by_hand.HIDDEN,
        num_attention_heads=by_hand.HEADS,
        ffn_hidden_size=by_hand.FFN,
        max_position_embeddings=by_hand.POSITIONS,
        vocab_size=by_hand.VOCAB,
    )
    write_megatron(tmp_path, model, Tensors(ours), version=version, iteration=5, **split)
    assert_written(tmp_path / "iter_0000005", files)


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_t5_as_by_hand(version: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours, files = by_hand.t5(version)
    model = make_model(
        model_type="t5",
        hidden_size=by_hand.HIDDEN,
        num_attention_heads=by_hand.HEADS,
        ffn_hidden_size=by_hand.FFN,
        max_position_embeddings=by_hand.POSITIONS,
        vocab_size=by_hand.VOCAB,
    )
    split: dict[str, Any] = {"tensor": 2, "pipeline": 3, "split_rank": 1}
    write_megatron(tmp_path, model, Tensors(ours), version=version, **split)
    assert_written(tmp_path / "release", files)


def test_llama_as_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours, files = by_hand.llama()
    model = make_model(
        model_type="gpt",
        num_layers=1,
        hidden_size=by_hand.HIDDEN,
        num_attention_heads=by_hand.HEADS,
        num_query_groups=2,
        ffn_hidden_size=by_hand.FFN,
        vocab_size=by_hand.VOCAB,
        swiglu=True,
        normalization="RMSNorm",
        position_embedding_type="rope",
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
    )
    write_megatron(tmp_path, model, Tensors(ours), tensor=2)
    assert_written(tmp_path / "release", files)


T5: dict[str, Any] = {"model_type": "t5"}
GPT: dict[str, Any] = {"model_type": "gpt"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"norm_position": "post"}, "--norm-position post: Megatron-LM knows pre"),
        (
            {"position_embedding_type": "relative_key"},
            "--position-embedding-type relative_key: Megatron-LM knows learned_absolute and rope",
        ),
        (T5 | {"position_embedding_type": "relative"}, "--position-embedding-type relative"),
        ({"attention_scale": 1.0}, "--attention-scale 1.0: Megatron-LM knows 0.5"),
        (GPT | {"logit_scale": 0.25}, "--logit-scale 0.25: Megatron-LM knows 1"),
        ({"geglu": True}, "--geglu: Megatron-LM knows --swiglu"),
        (
            T5 | {"untie_embeddings_and_output_weights": True},
            "--untie-embeddings-and-output-weights: Megatron-LM knows it of gpt, not of t5",
        ),
        (
            GPT | {"activation": "silu"},
            "--activation silu: Megatron-LM knows gelu, gelu_tanh and relu2",
        ),
        ({"activation": "relu2"}, "--activation relu2 with --head-activation relu2"),
        (
            {"activation": "gelu", "head_activation": "gelu_tanh"},
            "--activation gelu with --head-activation gelu_tanh",
        ),
        (
            {
                "activation": "gelu_tanh",
                "head_activation": "gelu",
                "disable_bias_linear": True,
            },
            "gelu_tanh with either (with gelu where there are biases)",
        ),
        (T5 | {"num_query_groups": 2}, "one group per head where there is cross attention"),
    ],
)
def test_what_megatron_lm_cannot_express(
    fields: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    assert expected in _refused(tmp_path, make_model(**fields))


@pytest.mark.parametrize(
    ("fields", "split", "expected"),
    [
        ({}, {"tensor": 3}, "--num-attention-heads 4 is not divisible by --tensor-model-parallel"),
        ({"ffn_hidden_size": 5}, {"tensor": 2}, "--ffn-hidden-size 5 is not divisible by --tensor"),
        (
            {"num_layers": 6},
            {"pipeline": 4},
            "--num-layers 6 is not divisible by --pipeline-model-parallel-size 4",
        ),
        ({}, {"pipeline": 2, "virtual": 2}, "--pipeline-model-parallel-size 2 x 2 virtual stages"),
        ({}, {"virtual": 2}, "2 virtual stages need --pipeline-model-parallel-size above 1"),
        ({}, {"pipeline": 2, "split_rank": 1}, "split-rank is for t5, not for bert"),
        (T5, {"pipeline": 2, "virtual": 2}, "Megatron-LM knows one of an encoder-decoder"),
        (T5, {"pipeline": 2, "split_rank": 2}, "split-rank 2: expected 1 to 1"),
        (
            T5 | {"num_layers": 3},
            {"pipeline": 3, "split_rank": 2},
            "--num-layers 3 is not divisible by the 2 pipeline ranks before",
        ),
        (
            T5 | {"decoder_num_layers": 3},
            {"pipeline": 4},
            "--decoder-num-layers 3 is not divisible by the 2 pipeline ranks from",
        ),
        ({}, {"version": 4}, "checkpoint version 4 is none of 0, 1, 2 and 3"),
        (
            GPT | {"num_query_groups": 2},
            {"version": 1},
            "--num-query-groups 2: checkpoint version 1 knows one group per head",
        ),
    ],
)
def test_what_does_not_divide(
    fields: dict[str, Any], split: dict[str, int], expected: str, tmp_path: Path
) -> None:
    assert expected in _refused(tmp_path, make_model(**fields), **split)


def _refused(directory: Path, model: ModelConfig, **options: Any) -> str:
    """What is said against writing the model, as one text; nothing is written."""
    source = Tensors({"language_model.embedding.word_embeddings.weight": torch.zeros(61, 16)})
    with pytest.raises(CheckpointError) as caught:
        write_megatron(directory, model, source, **options)
    assert list(directory.iterdir()) == []
    return "\n".join(caught.value.problems)


def test_a_source_without_a_tensor(tmp_path: Path) -> None:
    model = make_model()
    source = random_tensors(model)
    del source.tensors["language_model.encoder.layers.1.mlp.dense_h_to_4h.bias"]
    with pytest.raises(CheckpointError, match=r"missing: .*layers.1.mlp.dense_h_to_4h.bias"):
        write_megatron(tmp_path, model, source)
    source = random_tensors(model)
    source.tensors["classifier.weight"] = torch.zeros(3, 16)
    with pytest.raises(CheckpointError, match="no part of such a model: classifier.weight"):
        write_megatron(tmp_path, model, source)


def test_nothing_is_replaced(tmp_path: Path) -> None:
    model = make_model()
    write_megatron(tmp_path, model, random_tensors(model), iteration=3)
    with pytest.raises(CheckpointError, match="iter_0000003 exists already"):
        write_megatron(tmp_path, model, random_tensors(model), iteration=3)


class _Failing(Tensors):
    """Tensors of which one cannot be read."""

    def read(self, name: str) -> torch.Tensor:
        if name == "lm_head.bias":
            raise CheckpointError("lm_head.bias is damaged")
        return super().read(name)


def test_a_source_that_fails_leaves_the_latest_as_it_was(tmp_path: Path) -> None:
    model = make_model()
    source = random_tensors(model)
    write_megatron(tmp_path, model, source, iteration=3)
    with pytest.raises(CheckpointError, match="lm_head.bias is damaged"):
        write_megatron(tmp_path, model, _Failing(source.tensors), iteration=4, tensor=2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"iter_0000003", "latest_checkpointed_iteration.txt"}
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
    write_megatron(tmp_path, model, source, iteration=4)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"
