"""The checkpoint converters of transformers 4.34.0 read what we write for Megatron-LM.

A small BERT and a small GPT with random weights are written as Megatron-LM checkpoints of every
version, converted by `convert_megatron_bert_checkpoint.py` and
`convert_megatron_gpt2_checkpoint.py` as they are, loaded by transformers 4.34.0, and have our
logits. What the converters need, and do not do:

- Both read one file, of one tensor and one pipeline rank, and leave the vocabulary padded.
- BERT's needs a pooler and both heads. It takes the sizes from the arguments in the checkpoint,
  but neither the epsilon of LayerNorm nor the activation: those stay the defaults of
  `MegatronBertConfig`, 1e-12 and "gelu", unless a configuration file states others, as here.
- GPT-2's loads the tokenizer "gpt2" and saves it beside the model. It is given one made here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.megatron_lm.writer import write_megatron
from megatron.config import ModelConfig
from megatron.hf.parallel import native_config
from megatron.model import BertModel, GPTModel
from megatron.mpu import ParallelState
from megatron.mpu.stage import stages
from tests.hf.old.compare import Difference, Expected, difference, read_answer
from tests.hf.old.environment import ask, run_old
from tests.hf.old.records import Case

VERSIONS = [0, 1, 2, 3]
BATCH, LENGTH = 3, 11
CLASSES = {"bert": "MegatronBertForPreTraining", "gpt": "GPT2LMHeadModel"}
OUTPUTS = {"bert": ["prediction_logits", "seq_relationship_logits"], "gpt": ["logits"]}


@dataclass(frozen=True)
class Written:
    """A model of ours as a Megatron-LM checkpoint, with what it answers."""

    directory: Path
    model: ModelConfig
    case: Case
    logits: list[Tensor]


class _Tensors:
    """A model's tensors by their names, as a source of weights."""

    def __init__(self, network: torch.nn.Module) -> None:
        self._tensors = {
            parameter.shard_spec.name: parameter.detach()  # type: ignore[attr-defined]
            for parameter in network.parameters()
        }
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def written_checkpoints(seed: int, scratch: Path) -> Iterator[Written]:
    """A BERT and a GPT of every version, written under ``scratch``."""
    draw = random.Random(seed)
    for kind in CLASSES:
        for version in VERSIONS:
            yield _write(draw, kind, version, scratch / f"{kind} version {version}")


def converted(written: Written) -> list[Difference]:
    """How far their logits of the converted model are from ours of the written one."""
    _convert(written)
    answered = written.directory / "answer"
    job = {
        "case": written.case,
        "model": str(_file(written).parent),
        "directory": str(answered),
    }
    ask([job], written.directory)
    return list(_differences(written, read_answer(answered)))


def _write(draw: random.Random, kind: str, version: int, directory: Path) -> Written:
    heads = draw.choice([1, 2, 3, 4])
    model = ModelConfig(
        model_type=kind,
        num_layers=draw.randint(1, 3),
        hidden_size=heads * draw.choice([4, 8]),
        num_attention_heads=heads,
        ffn_hidden_size=draw.choice([24, 40]),
        vocab_size=draw.randint(37, 61),
        max_position_embeddings=draw.randint(LENGTH, 24),
        layernorm_epsilon=draw.choice([1e-12, 1e-5, 1e-3]),
        activation=draw.choice(["gelu", "gelu_tanh"]),
        init_method_std=0.1,
    )
    state = ParallelState.single()
    config = native_config(model, state)
    network_class = {"bert": BertModel, "gpt": GPTModel}[kind]
    network = network_class(config, state, stages([model.num_layers])[0], parallel_output=False)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    case = _case(draw, model)
    with torch.no_grad():
        logits = _logits(network.eval(), case["calls"][0])
    write_megatron(directory, network.config.model, _Tensors(network), version=version)
    return Written(directory, model, case, logits)


def _case(draw: random.Random, model: ModelConfig) -> Case:
    """What the converted model is asked."""

    def rows(below: int) -> list[list[int]]:
        return [[draw.randrange(below) for _ in range(LENGTH)] for _ in range(BATCH)]

    assert model.vocab_size is not None
    call: dict[str, Any] = {"input_ids": rows(model.vocab_size)}
    if model.model_type == "bert":
        mask = [[int(place < LENGTH - row) for place in range(LENGTH)] for row in range(BATCH)]
        call |= {"attention_mask": mask, "token_type_ids": rows(2)}
    else:
        call["use_cache"] = False
    return {
        "class": CLASSES[model.model_type],
        "arguments": {},
        "calls": [call],
        "through_past": False,
    }


def _logits(network: Any, call: dict[str, Any]) -> list[Tensor]:
    ids = torch.tensor(call["input_ids"])
    if "attention_mask" not in call:
        return [network(ids)]
    mask, types = torch.tensor(call["attention_mask"]), torch.tensor(call["token_type_ids"])
    return list(network(ids, mask.bool(), types))


def _convert(written: Written) -> None:
    """Run the script on the checkpoint; the model lies beside the file it was made from."""
    model, work = written.model, written.directory / "work"
    work.mkdir()
    module = {"bert": "megatron_bert", "gpt": "megatron_gpt2"}[model.model_type]
    epsilon = {"bert": "layer_norm_eps", "gpt": "layer_norm_epsilon"}[model.model_type]
    activation = {"bert": "hidden_act", "gpt": "activation_function"}[model.model_type]
    theirs = {"gelu": "gelu", "gelu_tanh": "gelu_new"}[model.activation]
    settings = {epsilon: model.layernorm_epsilon, activation: theirs}
    (work / "config.json").write_text(json.dumps(settings))
    if model.model_type == "gpt":
        _make_tokenizer(work / "gpt2")
    run_old(
        [
            "-m",
            f"transformers.models.{module}.convert_{module}_checkpoint",
            "--config_file",
            work / "config.json",
            _file(written),
        ],
        work,
    )


def _file(written: Written) -> Path:
    return written.directory / "release" / "mp_rank_00" / "model_optim_rng.pt"


def _make_tokenizer(directory: Path) -> None:
    """The least that a directory named "gpt2" needs to stand for the hub's model of that name."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (directory / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1}))
    (directory / "merges.txt").write_text("#version: 0.2\n")


def _differences(written: Written, answer: Expected) -> Iterator[Difference]:
    """The logits of the true vocabulary."""
    for name, ours in zip(OUTPUTS[written.model.model_type], written.logits, strict=True):
        theirs = answer.tensors[f"output/0/{name}"]
        yield difference(f"output/0/{name}", ours, theirs[..., : ours.size(-1)])
