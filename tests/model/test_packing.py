"""Packed micro-batches: the same losses and gradients as padded ones, from fewer tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.config import Config
from megatron.model.packing import pack
from megatron.mpu import ParallelState
from megatron.mpu.collectives import all_reduce
from megatron.mpu.stage import stages
from megatron.training.bert import BertPretraining
from megatron.training.initialize import rank_grid
from megatron.validation import validate
from tests.distributed import run_distributed
from tools.parity.samples import collate, synthetic_samples

SEQUENCE, BATCH = 24, 5

FLAGS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "seq_length": SEQUENCE,
    "max_position_embeddings": SEQUENCE,
    "vocab_size": 101,
    "make_vocab_size_divisible_by": 8,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "mask_prob": 0.3,
    "fp64": True,
    "use_cpu": True,
    "micro_batch_size": BATCH,
    "train_iters": 1,
    "lr": 1e-3,
}


def test_real_tokens_lie_one_sample_behind_the_other() -> None:
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    ids, types = (
        torch.tensor([[11, 12, 13, 0], [21, 0, 0, 0]]),
        torch.tensor([[0, 0, 1, 0], [0] * 4]),
    )
    packed = pack(ids, types, mask, torch.tensor([[2, 1], [0, 0]]), multiple=3)
    assert packed.input_ids.tolist() == [[11, 12, 13, 21, 0, 0]]
    assert packed.tokentype_ids.tolist() == [[0, 0, 1, 0, 0, 0]]
    assert packed.masked_positions.tolist() == [[2, 1], [3, 3]]
    assert packed.packing.position_ids.tolist() == [[0, 1, 2, 0, 0, 0]]
    assert packed.packing.first_tokens.tolist() == [0, 3]
    assert packed.packing.document_lengths.tolist() == [[3, 1, 2]]


@pytest.mark.parametrize("seed", range(5))
def test_every_real_token_is_there_once(seed: int) -> None:
    batch = _batch(_config(), seed)
    mask = batch["attention_mask"]
    packed = pack(*(batch[name] for name in _FIELDS), multiple=16)
    lengths = packed.packing.document_lengths[0]
    assert torch.equal(lengths[:-1], mask.sum(1)) and 0 <= lengths[-1] < 16
    assert packed.input_ids.size(1) == lengths.sum() and lengths.sum() % 16 == 0
    assert torch.equal(packed.input_ids[0, : mask.sum()], batch["input_ids"][mask])
    row, masked = packed.input_ids[0], batch["masked_positions"]
    assert torch.equal(row[packed.masked_positions], batch["input_ids"].gather(1, masked))
    assert torch.equal(row[packed.packing.first_tokens], batch["input_ids"][:, 0])


_FIELDS = ("input_ids", "tokentype_ids", "attention_mask", "masked_positions")


def _config(**flags: Any) -> Config:
    return Config.from_flags(FLAGS | flags)


def _batch(config: Config, seed: int = 0) -> dict[str, torch.Tensor]:
    return collate(synthetic_samples(config, BATCH, seed))


def _loss_and_gradients(
    flags: dict[str, Any], state: ParallelState | None = None
) -> dict[str, torch.Tensor]:
    config = _config(**flags)
    state = state or ParallelState.single()
    task = BertPretraining(config)
    (stage,) = stages([config.model.num_layers])
    model = task.build_model(config, state, stage)
    batch = _batch(config)
    loss, parts = task.forward_step(model, batch, task.denominators(batch))
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if parameter.shard_spec.partial:  # a sum over this rank's part of the row
            gradient = all_reduce(gradient, state.tensor)
        gradients[name] = gradient
    return {**parts, **gradients}


KINDS = [
    {},
    {"attention_backend": "unfused", "bert_no_binary_head": True},
    {"position_embedding_type": "rope", "num_tokentypes": 0},
    {"recompute_granularity": "full"},
    {"recompute_granularity": "selective", "norm_position": "post"},
]


@pytest.mark.parametrize("flags", KINDS)
def test_losses_and_gradients_are_those_of_padded_samples(flags: dict[str, Any]) -> None:
    _assert_equal(_loss_and_gradients(flags | {"pack_sequences": True}), _loss_and_gradients(flags))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_split_over_tensor_ranks(sequence_parallel: bool) -> None:
    flags = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    run_distributed(2, _assert_packing_changes_nothing, flags)


def _assert_packing_changes_nothing(flags: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    state = ParallelState.create(rank_grid(_config(**flags), 2))
    packed = _loss_and_gradients(flags | {"pack_sequences": True}, state)
    _assert_equal(packed, _loss_and_gradients(flags, state))
    state.destroy()


def _assert_equal(packed: dict[str, torch.Tensor], padded: dict[str, torch.Tensor]) -> None:
    assert packed.keys() == padded.keys()
    for name, expected in padded.items():
        error = (packed[name] - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < 1e-12, f"{name} differs by {error:.1e}"


def test_packing_goes_with_what_has_no_masks() -> None:
    flags = {"attention_backend": "flash", "use_cpu": False, "fp64": False, "bf16": True}
    assert not validate(_config(**flags, pack_sequences=True), 1)
