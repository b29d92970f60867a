"""The converter, run as users run it, and what stock `transformers` makes of its output."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron.checkpoint import save_checkpoint
from megatron.config import Config
from megatron.errors import CheckpointError, ConfigError, UserError
from megatron.model import build_bert
from megatron.mpu import ParallelState, Stage
from megatron.tokenizer import build_tokenizer
from tests.checkpoint.support import make_config

transformers = pytest.importorskip("transformers")

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


def convert(monkeypatch: pytest.MonkeyPatch, load: Path, save: Path, *more: str) -> None:
    words = ["--from", "native", "--to", "hf", "--load", str(load), "--save", str(save), *more]
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *words])
    tool.main()


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
def test_stock_transformers_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    config = make_config(**random_model(seed))
    model = save(tmp_path / "native", config).float()
    # Several files in half of the cases.
    convert(
        monkeypatch, tmp_path / "native", tmp_path / "hf", "--max-shard-gb", f"{1e-6 + seed % 2}"
    )
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
def test_the_tokenizer_goes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    vocabulary = tmp_path / "my-words.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n")
    config = make_config(vocab_size=len(WORDS))
    data = dataclasses.replace(config.data, vocab_file=str(vocabulary), tokenizer_type=kind)
    config = dataclasses.replace(config, data=data)
    save(tmp_path / "native", config, vocabulary)
    vocabulary.rename(tmp_path / "elsewhere.txt")  # the checkpoint has its own
    convert(monkeypatch, tmp_path / "native", tmp_path / "hf")

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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "native", make_config(layernorm_epsilon=0.1))
    true_config = tool.export_bert.__globals__["hugging_face_config"]
    monkeypatch.setitem(
        tool.export_bert.__globals__,
        "hugging_face_config",
        lambda *a, **k: true_config(*a, **k) | {"layer_norm_eps": 1e-12},
    )
    with pytest.raises(CheckpointError, match=r"differ by .*, more than 0.001: nothing was writt"):
        convert(monkeypatch, tmp_path / "native", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_only_an_earlier_conversion_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "native", make_config())
    occupied = tmp_path / "hf"
    occupied.mkdir()
    (occupied / "precious").touch()
    with pytest.raises(ConfigError, match="is no earlier conversion"):
        convert(monkeypatch, tmp_path / "native", occupied)
    (occupied / "precious").rename(occupied / "parity.json")
    convert(monkeypatch, tmp_path / "native", occupied)
    assert json.loads((occupied / "parity.json").read_text())["iteration"] == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]


def test_without_transformers_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the package transformers"):
        convert(monkeypatch, tmp_path, tmp_path / "hf")


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
