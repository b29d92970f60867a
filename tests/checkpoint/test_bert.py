"""BERT saved by split ranks is the very BERT that one process builds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from megatron.checkpoint import load_checkpoint, load_global_tensors, save_checkpoint
from megatron.checkpoint.save_load import NamedTensor
from megatron.config import Config
from megatron.model import build_bert
from megatron.mpu import ParallelState, Stage
from megatron.mpu.stage import stages
from megatron.mpu.topology import Topology
from tests.checkpoint.support import make_config
from tests.distributed import run_distributed

LAYERS = (1, 2)


def config() -> Config:
    """Three layers, a vocabulary of 61 padded to 64 whatever the tensor size."""
    model = make_config(num_layers=3, make_vocab_size_divisible_by=8)
    parallel = dataclasses.replace(model.parallel, pipeline_layers=LAYERS)
    return dataclasses.replace(model, parallel=parallel)


def tensors(state: ParallelState, stage: Stage) -> list[NamedTensor]:
    model = build_bert(config(), state, stage)
    specs = [(p.shard_spec, p) for p in model.parameters()]  # type: ignore[attr-defined]
    return [(spec.key, parameter, spec) for spec, parameter in specs]


def save_split(path: Path) -> None:
    state = ParallelState.create(Topology(4, tensor=2, pipeline=2))
    stage = stages(LAYERS)[state.pipeline.rank]
    save_checkpoint(path, 1, tensors(state, stage), {}, config=config(), state=state)


def load_split(path: Path) -> None:
    state = ParallelState.create(Topology(4, tensor=4))
    fresh = tensors(state, Stage(0, 1, 0, 3))
    truth = {key: parameter.detach().clone() for key, parameter, _ in fresh}
    for _, parameter, _ in fresh:
        torch.nn.init.zeros_(parameter)
    load_checkpoint(path, fresh, config=config(), state=state)
    for key, parameter, spec in fresh:
        for box in spec.rectangles(state.tensor.rank, 4):
            assert torch.equal(parameter[box.local_slices], truth[key][box.local_slices]), key


def test_bert_saved_by_split_ranks_is_the_whole_bert(tmp_path: Path) -> None:
    run_distributed(4, save_split, tmp_path)
    whole = {
        spec.key: p[:61] if p.shape[0] == 64 and spec.padded else p
        for _, p, spec in tensors(ParallelState.single(), Stage(0, 1, 0, 3))
    }
    stored = dict(load_global_tensors(tmp_path))
    assert stored.keys() == whole.keys()
    assert all(torch.equal(stored[key], whole[key]) for key in whole)
    run_distributed(4, load_split, tmp_path)
