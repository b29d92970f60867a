"""A checkpoint of ours written without holding the model is the one that training would save."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import load_checkpoint, save_checkpoint
from megatron.conversion import native
from megatron.conversion.native import read_native, write_native
from megatron.conversion.stored_model import TokenizerFiles
from megatron.mpu import ParallelState
from tests.configs import small
from tests.conversion.support import BERT, GPT, T5, build, stored

KINDS = {"bert": BERT, "gpt": GPT, "t5": T5, "bf16": GPT | {"bf16": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_written_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    box = random.Random(kind).choice([64, 500, 3000])
    monkeypatch.setattr(native, "_BOX_BYTES", box)
    model, _ = stored(**KINDS[kind])
    write_native(tmp_path, model, model.source, iteration=7)
    written = read_native(tmp_path)
    assert written.model == model.model
    assert written.iteration == 7
    assert written.source.shapes == model.source.shapes
    assert written.source.dtypes == model.source.dtypes
    for name in model.source.shapes:
        assert torch.equal(written.source.read(name), model.source.read(name)), name


def test_a_run_starts_from_it(tmp_path: Path) -> None:
    model, network = stored(**BERT)
    write_native(tmp_path, model, model.source, iteration=0)
    config = small(**BERT, finetune=True)
    other = build(config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    tensors = [(p.shard_spec.key, p, p.shard_spec) for p in other.parameters()]
    load_checkpoint(tmp_path, tensors, config=config, state=ParallelState.single())
    mine = dict(network.named_parameters())
    for name, parameter in other.named_parameters():
        rows = parameter.shard_spec.shape[0]
        assert torch.equal(parameter[:rows], mine[name][:rows]), name


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_BOX_BYTES", 256)
    model, _ = stored(**GPT)
    write_native(tmp_path, model, model.source, iteration=0)
    source = model.source
    largest = max(source.read(name).nbytes for name in source.shapes)
    assert source.most_live_bytes <= largest + 256  # and the box that was written last


def test_the_tokenizer_and_the_run_go_along(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("[PAD]\n")
    model, _ = stored(**BERT)
    files = TokenizerFiles(type="BertWordPieceCase", vocab_file=words)
    write_native(tmp_path / "new", model.with_tokenizer(files), model.source, iteration=3)
    written = read_native(tmp_path / "new")
    assert written.tokenizer.type == "BertWordPieceCase"
    assert written.tokenizer.vocab_file is not None
    assert written.tokenizer.vocab_file.read_text() == "[PAD]\n"
    # Another conversion keeps what the run said.
    write_native(tmp_path / "newer", written, written.source, iteration=3)
    again = read_native(tmp_path / "newer")
    assert (again.config, again.run_state) == (written.config, written.run_state)
    assert again.tokenizer.vocab_file is not None
    # And a tokenizer that is put beside it takes the place of the run's.
    others = tmp_path / "vocab.json"
    others.write_text("{}")
    changed = again.with_tokenizer(TokenizerFiles(type="GPT2BPETokenizer", vocab_file=others))
    write_native(tmp_path / "newest", changed, changed.source, iteration=3)
    newest = read_native(tmp_path / "newest").tokenizer
    assert newest.type == "GPT2BPETokenizer"
    assert newest.vocab_file is not None
    assert newest.vocab_file.name == "vocab.json"


def test_the_optimizers_state_is_left_behind_and_said_so(tmp_path: Path) -> None:
    config = small(**BERT)
    network = build(config)
    weights = [(p.shard_spec.key, p, p.shard_spec) for p in network.parameters()]
    states = [(f"optimizer.mean.{key}", p, spec) for key, p, spec in weights]
    run_state = {"samples": 5, "optimizer": {"steps": 9}, "learning_rates": {}}
    state = ParallelState.single()
    save_checkpoint(tmp_path, 9, weights + states, run_state, config=config, state=state)
    model = read_native(tmp_path)
    assert set(model.source.shapes) == {key for key, _, _ in weights}
    assert any("optimizer" in note for note in model.notes)
    assert model.run_state == {"samples": 5, "learning_rates": {}}
