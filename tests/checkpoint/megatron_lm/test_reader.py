"""Reading what is put together by hand: every version, split, release and packing."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.megatron_lm import open_megatron
from megatron.errors import CheckpointError
from tests.checkpoint.megatron_lm import by_hand
from tests.checkpoint.megatron_lm.support import Tensors, assert_equal


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("version", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "split",
    [
        {},
        {"tensor": 2},
        {"pipeline": 2},
        {"tensor": 4, "pipeline": 2},
        {"tensor": 2, "pipeline": 2, "virtual": 2},
    ],
)
def test_bert_of_any_version_and_split(version: int, split: dict[str, Any], tmp_path: Path) -> None:
    args = by_hand.arguments(
        vocab_size=by_hand.VOCAB,
        tensor_model_parallel_size=split.get("tensor", 1),
        pipeline_model_parallel_size=split.get("pipeline", 1),
    )
    ours, files = by_hand.bert(version, **split, args=args)
    by_hand.save(tmp_path, files)
    with open_megatron(tmp_path) as checkpoint:
        assert_equal(checkpoint, Tensors(ours))
        assert (checkpoint.version, checkpoint.iteration) == (version, 5)
        model = checkpoint.model
        assert (model.model_type, model.num_layers, model.vocab_size) == ("bert", 4, by_hand.VOCAB)
        assert (model.activation, model.head_activation) == ("gelu_tanh", "gelu")
        assert (model.ffn_size, model.head_size) == (by_hand.FFN, by_hand.HEAD_SIZE)
        assert checkpoint.notes == () == checkpoint.missing_heads


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_t5_over_tensor_and_pipeline_ranks(version: int, tmp_path: Path) -> None:
    ours, files = by_hand.t5(version)
    by_hand.save(tmp_path, files)
    with open_megatron(tmp_path, vocab_size=by_hand.VOCAB) as checkpoint:
        assert_equal(checkpoint, Tensors(ours))
        model = checkpoint.model
        assert (model.model_type, model.num_layers, model.decoder_layers) == ("t5", 2, 2)
        assert (model.activation, model.head_activation) == ("gelu", None)


def test_a_gpt_of_the_llama_family(tmp_path: Path) -> None:
    ours, files = by_hand.llama()
    by_hand.save(tmp_path, files)
    with open_megatron(tmp_path) as checkpoint:
        assert_equal(checkpoint, Tensors(ours))
        model = checkpoint.model
        assert (model.model_type, model.normalization, model.swiglu) == ("gpt", "RMSNorm", True)
        assert (model.num_query_groups, model.rotary_base) == (2, 500000.0)
        assert model.position_embedding_type == "rope"
        assert model.disable_bias_linear
        assert model.untie_embeddings_and_output_weights


def test_names_of_the_first_releases(tmp_path: Path) -> None:
    ours, files = by_hand.bert(0, attention="attention")
    file = files[0][0]
    del file["checkpoint_version"]
    language_model = file["model"]["language_model"]
    language_model["transformer"] = language_model.pop("encoder")
    for table, value in language_model.pop("embedding").items():
        language_model[f"{table}.weight"] = value["weight"]
    by_hand.save(tmp_path, files, name="release", _use_new_zipfile_serialization=False)
    with open_megatron(tmp_path, heads=by_hand.HEADS, vocab_size=by_hand.VOCAB) as checkpoint:
        assert_equal(checkpoint, Tensors(ours))
        assert (checkpoint.version, checkpoint.iteration) == (0, None)
        model = checkpoint.model
        assert (model.num_layers, model.hidden_size, model.ffn_size) == (4, 8, by_hand.FFN)
        assert model.max_position_embeddings == by_hand.POSITIONS
        assert (model.activation, model.lm_head_activation) == ("gelu", "gelu")
        assert not model.bert_no_binary_head
        beginnings = ["the checkpoint does not say its version", "no args", "args do not state"]
        assert [note.partition(":")[0] for note in checkpoint.notes][:2] == beginnings[:2]
        assert sum(note.startswith(beginnings[2]) for note in checkpoint.notes) == 5


def test_a_version_can_be_stated(tmp_path: Path) -> None:
    ours, files = by_hand.bert(1, args=by_hand.arguments(vocab_size=by_hand.VOCAB))
    files[0][0].pop("checkpoint_version")
    by_hand.save(tmp_path, files)
    with open_megatron(tmp_path, version=1) as checkpoint:
        assert_equal(checkpoint, Tensors(ours))


def test_padding_is_kept_where_nothing_says_what_is_padding(tmp_path: Path) -> None:
    _, files = by_hand.bert(3, args=by_hand.arguments())
    by_hand.save(tmp_path, files)
    with open_megatron(tmp_path) as checkpoint:
        assert checkpoint.model.vocab_size == by_hand.PADDED
        assert [note.partition(":")[0] for note in checkpoint.notes] == [
            "the checkpoint does not say how many of its 16 tokens are padding"
        ]


@pytest.mark.parametrize("path", ["", "iter_0000005", "iter_0000005/mp_rank_00/model_optim_rng.pt"])
def test_every_path_that_leads_to_it(path: str, tmp_path: Path) -> None:
    ours, files = by_hand.bert(2, args=by_hand.arguments(vocab_size=by_hand.VOCAB))
    by_hand.save(tmp_path, files)
    with open_megatron(tmp_path / path) as checkpoint:
        assert_equal(checkpoint, Tensors(ours))
        assert checkpoint.iteration == 5


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("top", ["", "megatron_bert_345m/"])
@pytest.mark.parametrize("with_latest", [True, False])
def test_an_archive_as_it_is_released(
    compression: int, top: str, with_latest: bool, tmp_path: Path
) -> None:
    ours, files = by_hand.bert(3, tensor=2, args=by_hand.arguments(vocab_size=by_hand.VOCAB))
    by_hand.save(tmp_path / "run", files, name="release")
    archive = tmp_path / "released.zip"
    with zipfile.ZipFile(archive, "w", compression) as packed:
        for file in (tmp_path / "run").rglob("*"):
            if file.is_file() and (with_latest or file.suffix == ".pt"):
                packed.write(file, top + str(file.relative_to(tmp_path / "run")))
    with open_megatron(archive) as checkpoint:
        assert_equal(checkpoint, Tensors(ours))
        assert checkpoint.iteration is None


def test_ranks_that_hold_different_norms_are_noted(tmp_path: Path) -> None:
    ours, files = by_hand.bert(3, tensor=2, args=by_hand.arguments(vocab_size=by_hand.VOCAB))
    layers = files[0][1]["model"]["language_model"]["encoder"]
    layers["layers.1.input_layernorm.bias"] = torch.zeros(by_hand.HIDDEN)
    by_hand.save(tmp_path, files)
    with open_megatron(tmp_path) as checkpoint:
        assert_equal(checkpoint, Tensors(ours))
        (note,) = checkpoint.notes
        assert "different values of 1 tensors" in note
        assert "layers.1.input_layernorm.bias" in note


def test_heads_of_tasks_are_left_out(tmp_path: Path) -> None:
    ours, files = by_hand.bert(3, args=by_hand.arguments(vocab_size=by_hand.VOCAB))
    model = files[0][0]["model"]
    del model["lm_head"], model["binary_head"]
    model["classification_head"] = {"weight": torch.zeros(3, 8), "bias": torch.zeros(3)}
    by_hand.save(tmp_path, files)
    with open_megatron(tmp_path) as checkpoint:
        rest = {name: t for name, t in ours.items() if name.startswith("language_model.")}
        assert_equal(checkpoint, Tensors(rest))
        assert checkpoint.missing_heads == ("lm_head", "binary_head")
        assert [note.split()[2] for note in checkpoint.notes] == [
            "classification_head.weight,",
            "classification_head.bias,",
        ]


def test_the_tokenizer_that_the_arguments_name(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n")
    args = by_hand.arguments(
        vocab_size=by_hand.VOCAB, vocab_file=str(vocabulary), merge_file="/nowhere/merges.txt"
    )
    _, files = by_hand.bert(3, args=args)
    by_hand.save(tmp_path, files)
    with open_megatron(tmp_path) as checkpoint:
        assert checkpoint.tokenizer_type == "BertWordPieceLowerCase"
        assert checkpoint.tokenizer_files == (vocabulary,)


def _opened(tmp_path: Path, files: by_hand.Files, **options: Any) -> str:
    """What is wrong with the files, as one text."""
    by_hand.save(tmp_path, files)
    with pytest.raises(CheckpointError) as caught:
        open_megatron(tmp_path, **options)
    return "\n".join(caught.value.problems)


class _Payload:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_code_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, files = by_hand.bert(3, args=by_hand.arguments())
    files[0][0]["rng_state"] = _Payload()
    problem = _opened(tmp_path, files)
    assert "mp_rank_00/model_optim_rng.pt is refused" in problem
    assert "print" in problem
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"apply_layernorm_1p": True}, "args.apply_layernorm_1p is True"),
        ({"num_experts": 8}, "args.num_experts is 8"),
        ({"position_embedding_type": "alibi"}, "args.position_embedding_type is alibi"),
        ({"normalization": "DeepNorm"}, "--normalization DeepNorm is none of"),
        ({"hidden_size": "wide"}, "--hidden-size expects an integer"),
        ({"hidden_dropout": 2.0}, "--hidden-dropout 2.0 is outside"),
        ({"num_layers": 10**9}, "args say num_layers 1000000000, found 4 layers"),
        ({"untie_embeddings_and_output_weights": True}, "output_weights of a bert"),
        (
            {"normalization": "RMSNorm"},
            "no part of such a model: language_model.encoder.layers.0.input_layernorm.bias",
        ),
        (
            {"position_embedding_type": "rope"},
            "no part of such a model: language_model.embedding.position_embeddings.weight",
        ),
        ({"ffn_hidden_size": 16}, "mlp.dense_h_to_4h.weight is [12, 8], expected [16, 8]"),
        ({"tensor_model_parallel_size": 2}, "args speak of 2 tensor ranks, found files of 1"),
        ({"pipeline_model_parallel_size": 4}, "args speak of 4 pipeline ranks"),
        ({"vocab_size": 17}, "args.vocab_size 17 is more than the 16 rows"),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    _, files = by_hand.bert(3, args=by_hand.arguments(**arguments))
    assert expected in _opened(tmp_path, files)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"heads": 2}, "--num-attention-heads 2, but"),
        ({"vocab_size": 99}, "--vocab-size 99 is more than the 16 rows"),
        ({"version": 4}, "checkpoint version 4, what can be read is 0, 1, 2 and 3"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, int], expected: str, tmp_path: Path) -> None:
    _, files = by_hand.bert(3, args=by_hand.arguments())
    assert expected in _opened(tmp_path, files, **options)


def test_heads_have_to_be_known(tmp_path: Path) -> None:
    _, files = by_hand.bert(3)
    assert "state it with --num-attention-heads" in _opened(tmp_path, files)


def test_ranks_that_do_not_go_together(tmp_path: Path) -> None:
    _, files = by_hand.bert(3, tensor=2, args=by_hand.arguments())
    layers = files[0][1]["model"]["language_model"]["encoder"]
    layers["layers.1.mlp.dense_h_to_4h.bias"] = torch.zeros(7)
    assert "is [7] torch.float32 on tensor rank 1, but [6]" in _opened(tmp_path / "a", files)
    del layers["layers.1.mlp.dense_h_to_4h.bias"]
    assert "tensor rank 1 holds no language_model" in _opened(tmp_path / "b", files)


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    _, files = by_hand.bert(3, args=by_hand.arguments())
    del files[0][0]["model"]["language_model"]["encoder"]["final_layernorm.bias"]
    problem = _opened(tmp_path, files)
    assert "tensors are missing: language_model.encoder.final_layernorm.bias" in problem


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64])
def test_codes_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    _, files = by_hand.bert(3, args=by_hand.arguments())
    encoder = files[0][0]["model"]["language_model"]["encoder"]
    encoder["final_layernorm.bias"] = encoder["final_layernorm.bias"].to(dtype)
    assert f"final_layernorm.bias is of {dtype}, expected a fl" in _opened(tmp_path, files)


def test_a_layer_far_beyond_the_others(tmp_path: Path) -> None:
    _, files = by_hand.bert(3)
    encoder = files[0][0]["model"]["language_model"]["encoder"]
    encoder["layers.99999999999.input_layernorm.weight"] = torch.ones(by_hand.HIDDEN)
    problem = _opened(tmp_path, files, heads=by_hand.HEADS)
    assert "tensors, but one of layer 99999999999" in problem


def test_a_file_without_a_model(tmp_path: Path) -> None:
    problem = _opened(tmp_path, [[{"state_dict": {}, "epoch": 3}]])
    assert "holds no model or model0, model1, ...; found state_dict, epoch" in problem


def test_files_that_are_missing(tmp_path: Path) -> None:
    _, files = by_hand.bert(3, tensor=2, pipeline=2, args=by_hand.arguments())
    checkpoint = by_hand.save(tmp_path, files)
    (checkpoint / "mp_rank_01_000/model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match="files of mp_rank_01_000 are missing"):
        open_megatron(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(CheckpointError, match="names iter_0000007"):
        open_megatron(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(CheckpointError, match="found 'soon', expected an iteration"):
        open_megatron(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such file"):
        open_megatron(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no Megatron-LM checkpoint"):
        open_megatron(tmp_path / "empty")


def test_which_of_several(tmp_path: Path) -> None:
    _, files = by_hand.bert(3, args=by_hand.arguments())
    by_hand.save(tmp_path, files)
    by_hand.save(tmp_path, files, name="iter_0000006")
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match="which of iter_0000005, iter_0000006 to read"):
        open_megatron(tmp_path)
