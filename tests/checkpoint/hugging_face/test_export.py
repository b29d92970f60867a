"""What is written loads in stock `transformers` and computes the same, and returns bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.hugging_face.export import write_hugging_face
from megatron.checkpoint.hugging_face.models import open_hugging_face
from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from tests.checkpoint.hugging_face.support import (
    LENGTH,
    TOLERANCE,
    DictSource,
    Tensors,
    build,
    difference,
    fill,
    random_tensors,
    tokens,
)

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

VOCABULARY = 61
LLAMA: dict[str, Any] = {
    "model_type": "gpt",
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "num_query_groups": 2,
    "hidden_dropout": 0.0,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "position_embedding_type": "relative",
    "normalization": "RMSNorm",
    "disable_bias_linear": True,
    "attention_scale": 1.0,
}
CASES: dict[str, dict[str, Any]] = {
    "MegatronBertForPreTraining": {},
    "MegatronBertForMaskedLM": {
        "bert_no_binary_head": True,
        "untie_embeddings_and_output_weights": True,
    },
    "BertForPreTraining": {"norm_position": "post", "activation": "relu"},
    "BertForMaskedLM": {"norm_position": "post", "bert_no_binary_head": True},
    "GPT2LMHeadModel": {"model_type": "gpt", "activation": "gelu_tanh"},
    "LlamaForCausalLM": LLAMA | {"untie_embeddings_and_output_weights": True, "rotary_base": 500.0},
    "LlamaForCausalLM, tied": LLAMA,
    "T5ForConditionalGeneration": T5 | {"logit_scale": 0.25, "activation": "relu"},
    "T5ForConditionalGeneration, own": T5
    | {"untie_embeddings_and_output_weights": True, "geglu": True, "activation": "gelu_tanh"},
    "T5ForConditionalGeneration, tied without scale": T5 | {"activation": "relu"},
}


def our_config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "max_position_embeddings": 12,
        "vocab_size": VOCABULARY,
    }
    return ModelConfig(**(sizes | changes))


def write(directory: Path, model: ModelConfig, ours: Tensors, **options: Any) -> list[str]:
    return write_hugging_face(
        directory, model, DictSource(ours), **({"max_bytes": 10**9} | options)
    )


def settings_of(directory: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return settings


def stored_in(directory: Path) -> Tensors:
    """All tensors of a directory's files by their names."""
    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors_torch.load_file(file)
    return tensors


def load(directory: Path, name: str) -> Any:
    """Their network, after a look at what they miss in the files."""
    network, report = getattr(transformers, name).from_pretrained(
        directory, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return network.eval()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_and_bits_return(case: str, tmp_path: Path) -> None:
    model, name = our_config(**CASES[case]), case.partition(",")[0]
    ours = random_tensors(model)
    write(tmp_path, model, ours)
    assert settings_of(tmp_path)["architectures"] == [name]

    network = load(tmp_path, name)
    ids, real = tokens(VOCABULARY), torch.ones(2, LENGTH, dtype=torch.long)
    native = fill(build(model), DictSource(ours))
    if model.model_type == "gpt":
        found, expected = native(ids), network(ids).logits
    elif model.model_type == "t5":
        decoder_ids = tokens(VOCABULARY, seed=1)
        found = native(ids, decoder_ids, real.bool())
        expected = network(input_ids=ids, decoder_input_ids=decoder_ids).logits
    else:
        found, _ = native(ids, real.bool(), torch.zeros_like(ids))
        expected = network(ids, attention_mask=real)[0]
    assert difference(found, expected) < TOLERANCE

    opened = open_hugging_face(settings_of(tmp_path), DictSource(stored_in(tmp_path)))
    for key, tensor in ours.items():
        assert torch.equal(opened.tensors.read(key), tensor), key
    # An output layer that was written because theirs scales where it ties becomes our own.
    own = opened.tensors.shapes.keys() - ours.keys()
    assert own == ({"language_model.output_layer.weight"} if "without" in case else set())


def test_several_files_hold_the_same(tmp_path: Path) -> None:
    model = our_config()
    ours = random_tensors(model)
    one, many = tmp_path / "one", tmp_path / "many"
    told: list[int] = []
    for directory, size in ((one, 10**9), (many, 2000)):
        directory.mkdir()
        write(directory, model, ours, max_bytes=size, on_bytes=told.append)
    assert len(list(many.glob("*.safetensors"))) > 2
    expected, found = stored_in(one), stored_in(many)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    sizes = [sum(tensor.nbytes for tensor in expected.values())] * 2
    assert [n for n, after in zip(told, [*told[1:], 0], strict=True) if after < n] == sizes
    load(many, "MegatronBertForPreTraining")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_stored_in_the_asked_type(dtype: torch.dtype, tmp_path: Path) -> None:
    model = our_config(model_type="gpt")
    ours = random_tensors(model)
    write(tmp_path, model, ours, dtype=dtype)
    stored = stored_in(tmp_path)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    norm = "language_model.encoder.final_layernorm.weight"
    assert torch.equal(stored["transformer.ln_f.weight"], ours[norm].to(dtype))
    assert settings_of(tmp_path)["torch_dtype"] == str(dtype).removeprefix("torch.")


HEADS = {
    "Model": ("pooler",),
    "ForNextSentencePrediction": ("pooler", "binary_head"),
    "ForSequenceClassification": ("pooler", "classifier"),
    "ForTokenClassification": ("classifier",),
    "ForQuestionAnswering": ("qa_outputs",),
}


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("name", HEADS)
def test_the_class_follows_from_the_heads(name: str, norm_position: str, tmp_path: Path) -> None:
    model = our_config(norm_position=norm_position)
    ours = random_tensors(model)
    labels = 2 if name == "ForQuestionAnswering" else 5
    for head in ("classifier", "qa_outputs"):
        ours |= {f"{head}.weight": torch.randn(labels, 16), f"{head}.bias": torch.randn(labels)}
    kept = {
        key: tensor
        for key, tensor in ours.items()
        if key.startswith(("language_model.embedding", "language_model.encoder"))
        or key.removeprefix("language_model.").split(".")[0] in HEADS[name]
    }
    write(tmp_path, model, kept)
    kind = "MegatronBert" if norm_position == "pre" else "Bert"
    network = load(tmp_path, kind + name)
    assert settings_of(tmp_path)["architectures"] == [kind + name]
    if "classifier" in HEADS[name]:
        assert network.config.num_labels == 5


def test_positions_that_are_not_used_are_zeros(tmp_path: Path) -> None:
    model = our_config(position_embedding_type="relative_key")
    notes = write(tmp_path, model, random_tensors(model))
    assert not stored_in(tmp_path)["bert.embeddings.position_embeddings.weight"].any()
    assert any("relative_key" in note for note in notes)


def test_tensors_missing_or_unknown_are_named(tmp_path: Path) -> None:
    model = our_config(model_type="gpt")
    ours = random_tensors(model)
    del ours["language_model.encoder.final_layernorm.bias"]
    ours["language_model.encoder.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        write(tmp_path, model, ours)
    (problem,) = error.value.problems
    assert "1 are missing ['language_model.encoder.final_layernorm.bias']" in problem
    assert "1 unknown ['language_model.encoder.extra']" in problem
    assert not list(tmp_path.iterdir())
