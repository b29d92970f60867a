"""What is written as a Megatron-LM checkpoint is read back bit by bit, whatever the split."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.megatron_lm import open_megatron, write_megatron
from megatron.config import ModelConfig
from tests.checkpoint.megatron_lm.support import (
    assert_equal,
    make_model,
    random_model,
    random_tensors,
)


def random_case(rng: random.Random) -> tuple[ModelConfig, dict[str, Any]]:
    """A model, and a split and version that it can be written with."""
    kind = rng.choice(["bert", "gpt", "t5"])
    tensor, pipeline = rng.choice([1, 2, 4]), rng.randint(1, 3)
    virtual = rng.randint(1, 3) if pipeline > 1 and kind != "t5" else 1
    split: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline, "virtual": virtual}
    layers = pipeline * virtual * rng.randint(1, 2)
    if kind == "t5" and pipeline > 1:
        split["split_rank"] = rng.randint(1, pipeline - 1)
        layers = split["split_rank"] * rng.randint(1, 2)
    model = random_model(rng, tensor=tensor, layers=layers, kind=kind)
    if kind == "t5" and rng.random() < 0.5:
        behind = pipeline - split.get("split_rank", 0)
        model = replace(model, decoder_num_layers=behind * rng.randint(1, 2))
    elif kind == "t5" and pipeline > 1:
        model = replace(model, num_layers=split["split_rank"] * (pipeline - split["split_rank"]))
    if model.decoder_num_layers == model.num_layers:
        model = replace(model, decoder_num_layers=None)
    split["version"] = rng.choice([2, 3] if model.num_query_groups else [0, 1, 2, 3])
    split["iteration"] = rng.choice([None, rng.randint(1, 10**8)])
    return model, split


@pytest.mark.parametrize("seed", range(40))
def test_written_and_read_back(seed: int, tmp_path: Path) -> None:
    model, options = random_case(random.Random(seed))
    print(seed, model, options)
    source = random_tensors(model, seed)
    progress: list[int] = []
    write_megatron(tmp_path, model, source, **options, on_bytes=progress.append)
    with open_megatron(tmp_path) as checkpoint:
        assert checkpoint.model == model
        assert checkpoint.iteration == options["iteration"]
        assert checkpoint.version == options["version"]
        assert (checkpoint.tensor, checkpoint.pipeline, checkpoint.virtual) == (
            options["tensor"],
            options["pipeline"],
            options["virtual"],
        )
        assert checkpoint.notes == ()
        assert_equal(checkpoint, source)
    sizes = [tensor.numel() * tensor.itemsize for tensor in source.tensors.values()]
    assert progress == sorted(progress)
    assert progress[-1] == sum(sizes)


def test_what_is_written_loads_with_torch(tmp_path: Path) -> None:
    model = make_model(model_type="gpt", num_layers=4)
    source = random_tensors(model)
    write_megatron(tmp_path, model, source, tensor=2, pipeline=2, version=2, iteration=70)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "70"
    files = sorted(tmp_path.glob("iter_0000070/*/*"))
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        f"iter_0000070/mp_rank_0{t}_00{p}/model_optim_rng.pt" for t in (0, 1) for p in (0, 1)
    ]
    loaded = torch.load(files[3], weights_only=False)
    assert loaded["checkpoint_version"] == 2.0
    assert loaded["iteration"] == 70
    assert (loaded["args"].num_layers, loaded["args"].padded_vocab_size) == (4, 64)
    assert loaded["args"].params_dtype is torch.float32
    language_model = loaded["model"]["language_model"]
    assert "embedding" not in language_model
    whole = source.read("language_model.encoder.layers.2.mlp.dense_4h_to_h.weight")
    part = language_model["encoder"]["layers.0.mlp.dense_4h_to_h.weight"]
    assert torch.equal(part, whole[:, 32:])
    copy = loaded["model"]["word_embeddings_for_head"]["weight"]
    words = source.read("language_model.embedding.word_embeddings.weight")
    assert torch.equal(copy, torch.cat((words[32:], words[-1:].expand(3, -1))))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_padded_tokens_are_impossible(kind: str, tmp_path: Path) -> None:
    model = make_model(model_type=kind, fp16=True)
    write_megatron(tmp_path, model, random_tensors(model))
    file = tmp_path / "release/mp_rank_00/model_optim_rng.pt"
    bias = torch.load(file, weights_only=False)["model"]["lm_head"]["bias"]
    assert bias.shape == (64,)
    assert bias[61:].tolist() == [-10000.0] * 3


@pytest.mark.parametrize("lacking", ["binary_head", "language_model.pooler", "lm_head"])
def test_a_missing_head_stays_missing(lacking: str, tmp_path: Path) -> None:
    model = make_model()
    source = random_tensors(model)
    for name in [name for name in source.tensors if name.startswith(lacking)]:
        del source.tensors[name]
    write_megatron(tmp_path, model, source, tensor=2, pipeline=2)
    with open_megatron(tmp_path) as checkpoint:
        assert checkpoint.missing_heads == (lacking,)
        assert checkpoint.model == replace(model, bert_no_binary_head=lacking == "binary_head")
        assert_equal(checkpoint, source)


def test_a_t5_without_biases_has_one_of_zeros_in_its_head(tmp_path: Path) -> None:
    model = make_model(model_type="t5", disable_bias_linear=True)
    source = random_tensors(model)
    assert "lm_head.bias" not in source.shapes
    write_megatron(tmp_path, model, source)
    with open_megatron(tmp_path) as checkpoint:
        assert_equal(checkpoint, source)
    file = tmp_path / "release/mp_rank_00/model_optim_rng.pt"
    loaded = torch.load(file, weights_only=False)
    assert not loaded["model"]["lm_head"]["bias"][:61].any()
    loaded["model"]["lm_head"]["bias"][5] = 1.0
    torch.save(loaded, file)
    with pytest.raises(ValueError, match="add_bias_linear is off, but lm_head.bias is not zero"):
        open_megatron(tmp_path)


def test_what_one_who_loads_it_has_to_know(tmp_path: Path) -> None:
    model = make_model(bert_no_binary_head=True)
    notes = write_megatron(tmp_path, model, random_tensors(model))
    assert [note.split(":")[0] for note in notes] == [
        "no optimizer's state is written",
        "args.tokenizer_type is BertWordPieceLowerCase, as usual for bert",
        "the MLP's GELU is the erf form, which Megatron-LM has with --no-bias-gelu-fusion",
        "2 token types",
    ]
