"""The converter, run as users run it, and what stock `transformers` makes of its output."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import pretrain_bert
from megatron.checkpoint import save_checkpoint
from megatron.checkpoint.hugging_face import export
from megatron.checkpoint.hugging_face.files import HuggingFaceFiles
from megatron.checkpoint.name_map import Heads
from megatron.checkpoint.stored import StoredTensors
from megatron.checkpoint.tensor_source import TensorSource
from megatron.config import Config
from megatron.conversion.native import read_native, write_native
from megatron.conversion.stored_model import StoredModel
from megatron.errors import CheckpointError, ConfigError, UserError
from megatron.model import build_bert
from megatron.monitor import read_metrics
from megatron.mpu import ParallelState, Stage
from megatron.tokenizer import build_tokenizer
from tests.checkpoint.support import make_config
from tests.conversion.support import BERT, GPT2, LLAMA, POST_BERT, T5, T5_OF_HF, stored
from tests.training.command import Command
from tests.training.corpus import write_corpus

transformers = pytest.importorskip("transformers")
load_file, save_file = (
    getattr(pytest.importorskip("safetensors.torch"), name) for name in ("load_file", "save_file")
)

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
STATE = ParallelState.single()
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "the", "cat", "s", "##at", "on", "."]


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def build(config: Config) -> torch.nn.Module:
    """A model with random values everywhere, so that a tensor in the wrong place shows."""
    model = build_bert(config, STATE, Stage(0, 1, 0, config.model.num_layers)).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(std=0.4, generator=generator)
    return model


def save(path: Path, config: Config, vocabulary: Path | None = None) -> torch.nn.Module:
    model = build(config)
    tensors = [
        (p.shard_spec.key, p, p.shard_spec)  # type: ignore[attr-defined]
        for p in model.parameters()
    ]
    files = [vocabulary] if vocabulary else []
    save_checkpoint(path, 9, tensors, {}, config=config, state=STATE, files=files)
    return model


class Convert:
    """The tool in this process: `convert("native", "hf", load, save, "--dtype", "float16")`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, source: str, target: str, load: Path, save: Path, *more: object) -> Path:
        """Returns `save`."""
        words = ["--from", source, "--to", target, "--load", load, "--save", save, *more]
        self._monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, words)])
        tool.main()
        return save


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Convert:
    return Convert(monkeypatch)


def certificate_of(directory: Path) -> dict[str, Any]:
    certificate = json.loads((directory / "parity.json").read_text())
    assert isinstance(certificate, dict)
    return certificate


def random_model(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 3])
    return {
        "num_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "hidden_size": heads * rng.choice([4, 5]),
        "vocab_size": rng.choice([31, 64, 129]),
        "layernorm_epsilon": rng.choice([1e-5, 1e-3, 1e-12]),
        "activation": ["gelu", "gelu_tanh"][seed % 2],
        "bert_no_binary_head": seed % 3 == 2,
        "ffn_hidden_size": rng.choice([None, 7]),
        "bf16": seed == 4,
    }


@pytest.mark.parametrize("seed", range(6))
def test_stock_transformers_computes_the_same(tmp_path: Path, convert: Convert, seed: int) -> None:
    config = make_config(**random_model(seed))
    model = save(tmp_path / "native", config).float()
    # Several files in half of the cases.
    shard = 1e-6 + seed % 2
    convert("native", "hf", tmp_path / "native", tmp_path / "hf", "--max-shard-gb", shard)
    auto = (
        transformers.AutoModelForMaskedLM
        if config.model.bert_no_binary_head
        else transformers.AutoModelForPreTraining
    )
    exported, report = auto.from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert exported.config.vocab_size == config.model.vocab_size
    assert exported.config.layer_norm_eps == config.model.layernorm_epsilon

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(exported.config.vocab_size, (3, 10), generator=generator)
    types = torch.randint(2, (3, 10), generator=generator)
    real = torch.arange(10) < torch.tensor([[10], [7], [1]])
    with torch.no_grad():
        theirs = exported.eval()(input_ids=ids, token_type_ids=types, attention_mask=real.long())
        masked_lm, next_sentence = getattr(model, "module", model)(ids, real, types)
    assert (theirs[0] - masked_lm[..., : exported.config.vocab_size]).abs().max() < 1e-4
    if next_sentence is not None:
        assert (theirs[1] - next_sentence).abs().max() < 1e-4

    certificate = json.loads((tmp_path / "hf" / "parity.json").read_text())
    assert certificate["max_abs_logit_diff"] < 1e-4
    assert certificate["iteration"] == 9
    assert 0 in certificate["input"]["attention_mask"][1]
    assert certificate["versions"]["transformers"] == transformers.__version__
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert (len(files) > 1) == (seed % 2 == 0)


@pytest.mark.parametrize("kind", ["BertWordPieceLowerCase", "BertWordPieceCase"])
def test_the_tokenizer_goes_along(tmp_path: Path, convert: Convert, kind: str) -> None:
    vocabulary = tmp_path / "my-words.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n")
    config = make_config(vocab_size=len(WORDS))
    data = dataclasses.replace(config.data, vocab_file=str(vocabulary), tokenizer_type=kind)
    config = dataclasses.replace(config, data=data)
    save(tmp_path / "native", config, vocabulary)
    vocabulary.rename(tmp_path / "elsewhere.txt")  # the checkpoint has its own
    convert("native", "hf", tmp_path / "native", tmp_path / "hf")

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    data = dataclasses.replace(data, vocab_file=str(tmp_path / "elsewhere.txt"))
    ours = build_tokenizer(data)
    text = "The cat sat  on THE café."
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.tokenize(text)
    pair = theirs("the cat", "sat")
    assert pair["input_ids"] == [2, 6, 7, 3, 8, 9, 3]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert theirs.model_max_length == config.model.max_position_embeddings
    exported = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert theirs.pad_token_id == exported.pad_token_id == ours.pad


def test_a_difference_is_a_failure_that_writes_nothing(
    tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "native", make_config(layernorm_epsilon=0.1))
    true_config = export.hugging_face_config
    monkeypatch.setattr(
        export,
        "hugging_face_config",
        lambda *a, **k: true_config(*a, **k) | {"layer_norm_eps": 1e-12},
    )
    with pytest.raises(CheckpointError, match=r"differ by .*, more than 0.001: nothing was writt"):
        convert("native", "hf", tmp_path / "native", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_a_map_that_is_wrong_in_both_directions_is_found(
    tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "native", make_config())
    split, join = Heads.split, Heads.join
    monkeypatch.setattr(Heads, "split", lambda self, ours: split(self, ours)[::-1])
    monkeypatch.setattr(Heads, "join", lambda self, theirs: join(self, theirs[::-1]))
    with pytest.raises(CheckpointError, match="more than 0.001: nothing was written"):
        convert("native", "hf", tmp_path / "native", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


@pytest.mark.parametrize("target", ["hf", "megatron", "native"])
def test_a_weight_that_changes_on_its_way_is_found(
    tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    save(tmp_path / "native", make_config())
    read = StoredTensors.read
    damaged = "language_model.embedding.position_embeddings.weight"

    def tampered(self: StoredTensors, key: str) -> torch.Tensor:
        tensor = read(self, key)
        writing = not (tmp_path / "written").exists()
        if key == damaged and writing and ".tmp" not in str(self.path):
            tensor[-1, -1] += 1e-6
            (tmp_path / "written").touch()
        return tensor

    monkeypatch.setattr(StoredTensors, "read", tampered)
    with pytest.raises(CheckpointError, match=f"{damaged} changed on the way"):
        convert("native", target, tmp_path / "native", tmp_path / "result", "--accept-difference")
    assert not (tmp_path / "result").exists()


def test_two_activations_do_not_fit_into_one_name(tmp_path: Path, convert: Convert) -> None:
    # What Megatron-LM's class computes: its fused MLP has another GELU than its head.
    model, _ = stored(**BERT | {"activation": "gelu_tanh", "head_activation": "gelu"})
    model.source.multiply("language_model.embedding.word_embeddings.weight", 30.0)
    write_native(tmp_path / "native", model, model.source, iteration=1)
    megatron = convert("native", "megatron", tmp_path / "native", tmp_path / "megatron")
    assert certificate_of(megatron)["differences"] == []
    theirs = tmp_path / "hf"
    with pytest.raises(CheckpointError, match="nothing was written; --accept-difference"):
        convert("megatron", "hf", megatron, theirs)
    assert not theirs.exists()
    certificate = certificate_of(convert("megatron", "hf", megatron, theirs, "--accept-difference"))
    assert certificate["accepted"]
    assert certificate["max_abs_logit_diff"] > 1e-3
    assert (
        "head_activation is gelu in the source and gelu_tanh in the target"
        in certificate["differences"]
    )


def test_only_an_earlier_conversion_is_replaced(tmp_path: Path, convert: Convert) -> None:
    save(tmp_path / "native", make_config())
    occupied = tmp_path / "hf"
    occupied.mkdir()
    (occupied / "precious").touch()
    with pytest.raises(ConfigError, match="is no earlier conversion"):
        convert("native", "hf", tmp_path / "native", occupied)
    (occupied / "precious").rename(occupied / "parity.json")
    convert("native", "hf", tmp_path / "native", occupied)
    assert certificate_of(occupied)["iteration"] == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]
    (occupied / "precious").touch()
    with pytest.raises(ConfigError, match="holds precious, which no conversion wrote there"):
        convert("native", "hf", tmp_path / "native", occupied)
    (occupied / "precious").unlink()
    with pytest.raises(ConfigError, match="holds what --load names"):
        convert("hf", "hf", occupied, occupied)


def test_a_run_killed_between_the_two_renames_is_undone(tmp_path: Path, convert: Convert) -> None:
    save(tmp_path / "native", make_config())
    theirs = convert("native", "hf", tmp_path / "native", tmp_path / "hf")
    theirs.rename(tmp_path / ".hf.old")
    with pytest.raises(CheckpointError, match="no such directory"):
        convert("native", "hf", tmp_path / "nothing", theirs)
    assert certificate_of(theirs)["iteration"] == 9
    convert("native", "hf", tmp_path / "native", theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]


def test_a_link_leads_to_the_result(tmp_path: Path, convert: Convert) -> None:
    save(tmp_path / "native", make_config())
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "hf")
    for _ in range(2):
        convert("native", "hf", tmp_path / "native", link)
        assert link.is_symlink()
        assert certificate_of(tmp_path / "disk" / "hf")["target"]["path"] == str(link)
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["hf"]


def test_without_transformers_one_line_says_so(
    tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the package transformers"):
        convert("native", "hf", tmp_path, tmp_path / "hf")


# Round trips.


def native_of(path: Path, **values: Any) -> StoredModel:
    """A checkpoint of ours of a random model, opened."""
    model, _ = stored(**values)
    write_native(path, model, model.source, iteration=4)
    return read_native(path)


def assert_same_tensors(one: TensorSource, other: TensorSource) -> None:
    assert one.shapes == other.shapes
    assert one.dtypes == other.dtypes
    for name in one.shapes:
        ours, theirs = one.read(name), other.read(name)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name


SPLIT = ["--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2]
CHUNKS = [*SPLIT, "--target-virtual-pipeline-size", 2]
LAYERS = {"num_layers": 4}


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        (BERT | LAYERS, CHUNKS),
        (BERT | LAYERS | {"bf16": True, "bert_no_binary_head": True}, SPLIT),
        (GPT2 | LAYERS, CHUNKS),
        (LLAMA | LAYERS, CHUNKS),
        (T5 | LAYERS, [*SPLIT, "--target-split-rank", 1]),
    ],
    ids=["bert", "bf16", "gpt", "llama", "t5"],
)
def test_megatron_and_back(
    tmp_path: Path, convert: Convert, values: dict[str, Any], flags: list[object]
) -> None:
    model = native_of(tmp_path / "native", **values)
    megatron = convert("native", "megatron", tmp_path / "native", tmp_path / "megatron", *flags)
    written = certificate_of(megatron)["target"]
    assert written["split"]["tensor"] == written["split"]["pipeline"] == 2
    assert written["split"]["virtual"] == (2 if flags is CHUNKS else 1)
    back = read_native(convert("megatron", "native", megatron, tmp_path / "back"))
    assert_same_tensors(back.source, model.source)
    assert back.iteration == model.iteration
    assert certificate_of(tmp_path / "back")["differences"] == []
    assert certificate_of(tmp_path / "back")["max_abs_logit_diff"] == 0.0


@pytest.mark.parametrize(
    "values",
    [BERT, POST_BERT, GPT2 | {"bf16": True}, LLAMA, T5_OF_HF],
    ids=["megatron-bert", "bert", "gpt2", "llama", "t5"],
)
def test_hugging_face_and_back(tmp_path: Path, convert: Convert, values: dict[str, Any]) -> None:
    model = native_of(tmp_path / "native", **values)
    theirs = convert("native", "hf", tmp_path / "native", tmp_path / "hf")
    assert certificate_of(theirs)["target"]["evaluated_by"] == "transformers"
    assert certificate_of(theirs)["max_abs_logit_diff"] < 1e-5
    back = read_native(convert("hf", "native", theirs, tmp_path / "back"))
    assert_same_tensors(back.source, model.source)
    assert certificate_of(tmp_path / "back")["differences"] == []


SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}


def hugging_face_model(kind: str, name: str | None = None) -> Any:
    """A model of theirs, of the class that pretrains by default, with random values everywhere."""
    own = {"Llama": "ForCausalLM", "GPT2": "LMHeadModel"}.get(kind, "ForPreTraining")
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(**SIZES, **ids)
    model = getattr(transformers, kind + (name or own))(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model


@pytest.mark.parametrize("version", range(4))
@pytest.mark.parametrize("kind", ["MegatronBert", "GPT2", "Llama"])
def test_every_version_of_megatron_returns_the_bits(
    tmp_path: Path, convert: Convert, kind: str, version: int
) -> None:
    hugging_face_model(kind).save_pretrained(tmp_path / "theirs")
    split = ["--target-tensor-parallel-size", 2, "--target-version", version, "--release"]
    megatron = convert("hf", "megatron", tmp_path / "theirs", tmp_path / "megatron", *split)
    assert (megatron / "release" / "mp_rank_01" / "model_optim_rng.pt").is_file()
    assert certificate_of(megatron)["target"]["version"] == version
    back = convert("megatron", "hf", megatron, tmp_path / "back")
    ours, theirs = HuggingFaceFiles(back), HuggingFaceFiles(tmp_path / "theirs")
    assert_same_tensors(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "name", "compared"),
    [
        ("MegatronBert", "Model", {"hidden_states", "pooled"}),
        ("Bert", "ForTokenClassification", {"hidden_states"}),
        ("Bert", "ForNextSentencePrediction", {"next_sentence"}),
    ],
)
def test_models_without_pretraining_heads(
    tmp_path: Path, convert: Convert, kind: str, name: str, compared: set[str]
) -> None:
    hugging_face_model(kind, name).save_pretrained(tmp_path / "theirs")
    native = convert("hf", "native", tmp_path / "theirs", tmp_path / "native")
    certificate = certificate_of(native)
    assert set(certificate["max_abs_logit_diff_of"]) == compared
    assert certificate["architecture"] == kind + name
    assert any("no masked-LM head" in note for note in certificate["notes"])
    back = convert("native", "hf", native, tmp_path / "back")
    assert certificate_of(back)["architecture"] == kind + name
    assert_same_tensors(HuggingFaceFiles(back), HuggingFaceFiles(tmp_path / "theirs"))


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("named", ["BertForMaskedLM", None])
def test_a_class_that_holds_less_than_the_files(
    tmp_path: Path, convert: Convert, named: str | None
) -> None:
    theirs = tmp_path / "theirs"
    hugging_face_model("Bert").save_pretrained(theirs)
    edit_config(theirs, architectures=named and [named])
    native = convert("hf", "native", theirs, tmp_path / "native")
    certificate = certificate_of(native)
    assert certificate["architecture"] == "BertForPreTraining"
    assert set(certificate["max_abs_logit_diff_of"]) == {"masked_lm", "next_sentence"}
    assert any(str(named) in note for note in certificate["notes"]) == (named is not None)


def test_a_pooler_that_the_class_does_not_use_is_left_out(tmp_path: Path, convert: Convert) -> None:
    theirs = tmp_path / "theirs"
    hugging_face_model("Bert", "ForQuestionAnswering").save_pretrained(theirs)
    edit_weights(
        theirs,
        lambda tensors: tensors.update(
            {
                "bert.pooler.dense.weight": torch.ones(16, 16),
                "bert.pooler.dense.bias": torch.ones(16),
            }
        ),
    )
    again = convert("hf", "hf", theirs, tmp_path / "again")
    certificate = certificate_of(again)
    assert certificate["architecture"] == "BertForQuestionAnswering"
    assert set(certificate["max_abs_logit_diff_of"]) == {"start", "end"}
    assert (
        "the pooler is left out: BertForQuestionAnswering does not use it" in certificate["notes"]
    )


def test_buffers_of_early_releases_mean_nothing(tmp_path: Path, convert: Convert) -> None:
    theirs = tmp_path / "theirs"
    hugging_face_model("GPT2").save_pretrained(theirs)
    edit_weights(
        theirs,
        lambda tensors: tensors.update(
            {
                "transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12).tril(),
                "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
            }
        ),
    )
    native = convert("hf", "native", theirs, tmp_path / "native")
    assert certificate_of(native)["max_abs_logit_diff"] < 1e-5


def test_a_bias_that_early_releases_store_once(tmp_path: Path, convert: Convert) -> None:
    theirs = tmp_path / "theirs"
    config = transformers.MegatronBertConfig(**SIZES, tie_word_embeddings=False)
    transformers.MegatronBertForMaskedLM(config).save_pretrained(theirs)
    edit_weights(theirs, lambda tensors: tensors["cls.predictions.bias"].normal_())
    edit_weights(theirs, lambda tensors: tensors.pop("cls.predictions.decoder.bias", None))
    native = convert("hf", "native", theirs, tmp_path / "native")
    assert certificate_of(native)["max_abs_logit_diff"] < 1e-5


def test_what_transformers_cannot_compute_is_one_line(tmp_path: Path, convert: Convert) -> None:
    theirs = tmp_path / "theirs"
    hugging_face_model("Bert", "ForQuestionAnswering").save_pretrained(theirs)
    edit_config(theirs, id2label={str(n): f"LABEL_{n}" for n in range(5)})
    edit_weights(
        theirs,
        lambda tensors: tensors.update(
            {"qa_outputs.weight": torch.ones(5, 16), "qa_outputs.bias": torch.ones(5)}
        ),
    )
    with pytest.raises(CheckpointError, match="BertForQuestionAnswering .* cannot compute"):
        convert("hf", "native", theirs, tmp_path / "native")


@pytest.mark.parametrize("target", ["native", "megatron"])
def test_parts_of_different_types_become_one(tmp_path: Path, convert: Convert, target: str) -> None:
    theirs = tmp_path / "theirs"
    hugging_face_model("Llama").save_pretrained(theirs)

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            kind = torch.float16 if ".q_proj." in name else torch.bfloat16
            tensors[name] = tensors[name].to(kind)

    edit_weights(theirs, mix)
    converted = convert("hf", target, theirs, tmp_path / "converted")
    (note,) = (n for n in certificate_of(converted)["notes"] if "different types" in n)
    assert "the parts of 2 tensors" in note
    again = HuggingFaceFiles(convert(target, "hf", converted, tmp_path / "again"))
    for name, tensor in load_file(theirs / "model.safetensors").items():
        assert torch.equal(again.read(name).double(), tensor.double()), name


def test_codes_are_no_weights(tmp_path: Path, convert: Convert) -> None:
    theirs = tmp_path / "theirs"
    hugging_face_model("GPT2").save_pretrained(theirs)
    edit_weights(
        theirs, lambda tensors: tensors.update({k: t.to(torch.int8) for k, t in tensors.items()})
    )
    with pytest.raises(CheckpointError, match=r"is of torch\.int8, expected a floating type"):
        convert("hf", "hf", theirs, tmp_path / "hf")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"vocab_size": 62}, r"word_embeddings.weight is \(61, 16\), expected \(62, 16\)"),
        ({"vocab_size": 10**40}, "no model has the stated sizes"),
        ({"n_layer": 10**12}, "config.json speaks of 1000000000000 layers, found 28 tensors"),
        ({"n_positions": 11}, r"position_embeddings.weight is \(12, 16\), expected \(11, 16\)"),
        ({"model_type": ["gpt2"]}, r"model_type is \['gpt2'\]"),
        # Built from the sizes that its configuration has by default, it would fill the memory.
        ({"architectures": ["LlamaForCausalLM"]}, "expected a class of gpt2, GPT2..."),
    ],
)
def test_a_configuration_of_another_model(
    tmp_path: Path, convert: Convert, fields: dict[str, Any], problem: str
) -> None:
    theirs = tmp_path / "theirs"
    hugging_face_model("GPT2").save_pretrained(theirs)
    edit_config(theirs, **fields)
    with pytest.raises(CheckpointError, match=problem):
        convert("hf", "native", theirs, tmp_path / "native")


def test_labels_that_the_weights_do_not_have_are_named(tmp_path: Path, convert: Convert) -> None:
    theirs = tmp_path / "theirs"
    hugging_face_model("Bert", "ForTokenClassification").save_pretrained(theirs)
    edit_config(theirs, id2label={"0": "A"}, label2id={"A": 0})
    with pytest.raises(CheckpointError, match=r"mismatched_keys.*classifier\.weight"):
        convert("hf", "native", theirs, tmp_path / "native")


@pytest.mark.parametrize("target", ["native", "megatron", "hf"])
def test_a_full_disk_is_one_line(tmp_path: Path, convert: Convert, target: str) -> None:
    hugging_face_model("GPT2").save_pretrained(tmp_path / "theirs")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        with pytest.raises((CheckpointError, OSError)) as raised:
            convert("hf", target, tmp_path / "theirs", tmp_path / "result")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    # Of an OSError the command makes a line where it says the file.
    assert isinstance(raised.value, CheckpointError) or raised.value.filename
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("names", [5, [5], {"a": 1}, "GPT2LMHeadModel"])
def test_architectures_that_are_no_list_of_names(
    tmp_path: Path, convert: Convert, names: Any
) -> None:
    hugging_face_model("GPT2").save_pretrained(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", architectures=names)
    with pytest.raises(CheckpointError, match="expected a list of names"):
        convert("hf", "native", tmp_path / "theirs", tmp_path / "native")


@pytest.mark.parametrize("how", [["finetune"], ["no_load_optim", "override_lr_scheduler"]])
def test_training_goes_on_from_what_transformers_saved(
    tmp_path: Path,
    convert: Convert,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    how: list[str],
) -> None:
    corpus = write_corpus(tmp_path)
    words = len(corpus.vocab_file.read_text().splitlines())
    sizes = SIZES | {"vocab_size": words, "max_position_embeddings": 16, "layer_norm_eps": 1e-5}
    config = transformers.MegatronBertConfig(**sizes)
    theirs = transformers.MegatronBertForPreTraining(config)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer = ["--tokenizer-type", "BertWordPieceCase", "--vocab-file", corpus.vocab_file]
    native = convert("hf", "native", tmp_path / "theirs", tmp_path / "native", *tokenizer)
    assert [file.name for file in read_native(native).tokenizer.named.values()] == ["vocab.txt"]

    metrics = tmp_path / "metrics.jsonl"
    options = {
        "load": native,
        "metrics_file": metrics,
        "train_iters": 2,
        **dict.fromkeys(how, True),
    }
    flags = corpus.flags(ffn_hidden_size=24, tokenizer_type="BertWordPieceCase", **options)
    command = Command(pretrain_bert, capfd, monkeypatch)
    assert command(flags) == 0, command.err
    first = next(record for record in read_metrics(metrics) if "lm_loss" in record)
    assert abs(first["lm_loss"] - math.log(words)) < 0.5


def test_the_same_format_in_other_pieces(tmp_path: Path, convert: Convert) -> None:
    hugging_face_model("GPT2").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "theirs" / "vocab.json").write_text("{}")
    model = convert("hf", "hf", tmp_path / "theirs", tmp_path / "hf", "--max-shard-gb", 1e-6)
    assert len(list(model.glob("*.safetensors"))) > 1
    assert (model / "merges.txt").read_text() == "#version: 0.2\n"
    assert_same_tensors(HuggingFaceFiles(model), HuggingFaceFiles(tmp_path / "theirs"))

    one = convert("hf", "megatron", model, tmp_path / "one", *SPLIT, "--iteration", 12)
    two = convert("megatron", "megatron", one, tmp_path / "two", "--target-version", 1)
    assert (two / "iter_0000012" / "mp_rank_00" / "model_optim_rng.pt").is_file()
    again = convert("megatron", "hf", two, tmp_path / "again")
    assert_same_tensors(HuggingFaceFiles(again), HuggingFaceFiles(model))


def test_number_formats_on_the_way(tmp_path: Path, convert: Convert) -> None:
    model = native_of(tmp_path / "native", **GPT2)
    half = convert(
        "native", "native", tmp_path / "native", tmp_path / "half", "--dtype", "bfloat16"
    )
    written = read_native(half)
    assert written.model.bf16
    for name in model.source.shapes:
        assert torch.equal(written.source.read(name), model.source.read(name).bfloat16())
    assert "values were converted from float32 to bfloat16" in certificate_of(half)["notes"]


def test_relative_positions_are_not_left_to_those_who_drop_them(
    tmp_path: Path, convert: Convert
) -> None:
    values = BERT | {"position_embedding_type": "relative_key_query"}
    model = native_of(tmp_path / "native", **values)
    theirs = convert("native", "hf", tmp_path / "native", tmp_path / "hf")
    drops = int(transformers.__version__.split(".")[0]) >= 5
    evaluated_by = certificate_of(theirs)["target"]["evaluated_by"]
    assert evaluated_by == ("megatron" if drops else "transformers")
    back = read_native(convert("hf", "native", theirs, tmp_path / "back"))
    assert_same_tensors(back.source, model.source)


def test_padding_that_nobody_knows_of_is_named(tmp_path: Path, convert: Convert) -> None:
    native_of(tmp_path / "native", **GPT2)
    words = tmp_path / "vocab.json"
    words.write_text("{}")
    merges = tmp_path / "merges.txt"
    merges.touch()
    tokenizer = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", words]
    tokenizer += ["--merge-file", merges]
    megatron = convert("native", "megatron", tmp_path / "native", tmp_path / "megatron", *tokenizer)
    assert (megatron / "tokenizer" / "vocab.json").read_text() == "{}"
    trimmed = convert("megatron", "native", megatron, tmp_path / "trimmed", "--vocab-size", 50)
    assert read_native(trimmed).model.vocab_size == 50


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            "--from native --to hf --target-version 1",
            "--target-version has no meaning with --to hf",
        ),
        (
            "--from native --to megatron --max-shard-gb 1",
            "--max-shard-gb has no meaning with --to me",
        ),
        ("--from hf --to native --heads 2", "--heads has no meaning with --from hf"),
        (
            "--from native --to hf --max-shard-gb 0",
            "--max-shard-gb: found 0.0, expected more than 0",
        ),
        ("--from native --to hf --max-shard-gb nan", "--max-shard-gb: found nan"),
        ("--from native --to hf --max-shard-gb inf", "--max-shard-gb: found inf"),
        ("--from native --to native --vocab-file x", "--vocab-file needs --tokenizer-type"),
        ("--from native --to megatron --iteration x", "expected a whole number"),
        ("--from native --to megatron --release --iteration 1", "not allowed with"),
        ("--from elsewhere --to hf", "invalid choice: 'elsewhere'"),
    ],
)
def test_flags_without_meaning_are_refused(words: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        tool.parse_arguments([*words.split(), "--load", "a", "--save", "b"])


@pytest.mark.parametrize(
    ("values", "target", "flags", "problem"),
    [
        (BERT, "megatron", SPLIT[2:], r"--num-layers 3 .*--target-pipeline-parallel-size 2"),
        (LLAMA, "megatron", ["--target-version", 0], "--num-query-groups 2"),
        (POST_BERT, "megatron", [], "--norm-position post"),
        (T5, "hf", [], "--position-embedding-type learned_absolute"),
    ],
)
def test_what_a_format_cannot_say_is_one_line(
    tmp_path: Path,
    convert: Convert,
    values: dict[str, Any],
    target: str,
    flags: list[object],
    problem: str,
) -> None:
    native_of(tmp_path / "native", **values)
    with pytest.raises(CheckpointError, match=problem):
        convert("native", target, tmp_path / "native", tmp_path / "result", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_a_pickle_that_would_run_is_refused_by_name(tmp_path: Path, convert: Convert) -> None:
    hugging_face_model("GPT2").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    torch.save({"weight": Path("x")}, tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pathlib"):
        convert("hf", "native", tmp_path / "theirs", tmp_path / "native")
    torch.save({"model": {"weight": Path("x")}}, tmp_path / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match="pathlib"):
        convert("megatron", "native", tmp_path / "model_optim_rng.pt", tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_the_command_line(tmp_path: Path) -> None:
    save(tmp_path / "native", make_config())

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, TOOL, *words]
        return subprocess.run([str(w) for w in command], capture_output=True, text=True)

    load = ("--load", tmp_path / "native", "--save", tmp_path / "hf")
    finished = run("--from", "native", "--to", "hf", *load)
    assert finished.returncode == 0, finished.stderr
    assert "largest difference between logits" in finished.stdout

    failed = run("--from", "native", "--to", "hf", "--load", tmp_path / "no", *load[2:])
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert f"{tmp_path / 'no'}: there is no such directory" in failed.stderr
    assert "Traceback" not in failed.stderr
