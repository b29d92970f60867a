"""BERT on a stage: its heads, its shared embedding and its formats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron.model import BertModel, Float16Module, build_bert
from megatron.mpu import ParallelState, Topology
from megatron.mpu.stage import stages
from tests.distributed import distributed, run_distributed

VOCABULARY, SEQUENCE = 53, 10


def _config(**model: object) -> Config:
    options = {
        "num_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "max_position_embeddings": SEQUENCE + 2,
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 8,
        "fp64": True,
    }
    return Config(
        model=ModelConfig(**options | model),
        parallel=ParallelConfig(use_cpu=True),
        optimizer=OptimizerConfig(lr=1e-3),
        data=DataConfig(seq_length=SEQUENCE),
        train=TrainConfig(micro_batch_size=2, train_iters=1),
    )


def _inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, a mask with padding, and token types, each [b, s]."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(VOCABULARY, (batch, SEQUENCE), generator=generator)
    types = torch.randint(2, (batch, SEQUENCE), generator=generator)
    lengths = torch.randint(4, SEQUENCE + 1, (batch, 1), generator=generator)
    return ids, torch.arange(SEQUENCE) < lengths, types


def _whole(config: Config, **options: bool) -> BertModel:
    (stage,) = stages([config.model.num_layers])
    return BertModel(config, ParallelState.single(), stage, **options).eval()


def test_masked_positions_are_a_selection_of_the_full_logits() -> None:
    model = _whole(_config())
    ids, mask, types = _inputs()
    full, binary = model(ids, mask, types)
    assert full.shape == (3, SEQUENCE, 56) and binary.shape == (3, 2)
    positions = torch.tensor([[0, 9], [3, 3], [5, 1]])
    some, _ = model(ids, mask, types, masked_positions=positions)
    expected = full.gather(1, positions[..., None].expand(-1, -1, full.size(-1)))
    torch.testing.assert_close(some, expected, rtol=1e-12, atol=1e-12)
    labels = torch.tensor([[1, 2], [3, 4], [5, 52]])
    loss, _ = model(ids, mask, types, lm_labels=labels, masked_positions=positions)
    real = expected[..., :VOCABULARY].log_softmax(-1)
    nll = -real.gather(-1, labels[..., None]).squeeze(-1)
    torch.testing.assert_close(loss, nll, rtol=1e-12, atol=1e-12)


def test_padding_is_not_looked_at() -> None:
    model = _whole(_config(), parallel_output=False)
    ids, mask, types = _inputs()
    other = torch.where(mask, ids, (ids + 1) % VOCABULARY)
    first, _ = model(ids, mask, types)
    second, _ = model(other, mask, types)
    assert first.shape == (3, SEQUENCE, VOCABULARY)
    torch.testing.assert_close(first[mask], second[mask], rtol=0, atol=0)


def test_token_types_default_to_the_first_sentence() -> None:
    model = _whole(_config())
    ids, mask, types = _inputs()
    assert torch.equal(model(ids, mask)[0], model(ids, mask, torch.zeros_like(types))[0])
    assert not torch.equal(model(ids, mask)[0], model(ids, mask, types)[0])


def test_without_a_binary_head() -> None:
    model = build_bert(_config(bert_no_binary_head=True), ParallelState.single(), stages([3])[0])
    ids, mask, types = _inputs()
    assert model(ids, mask, types)[1] is None
    names = model.state_dict_for_save_checkpoint()
    assert not any("pooler" in name or "binary" in name for name in names)


def test_the_keys_bias_gets_no_gradient_by_rounding() -> None:
    model = _whole(_config(fp64=False))
    ids, mask, types = _inputs()
    model(ids, mask, types)[0].square().sum().backward()
    for layer in model.language_model.encoder.layers:
        gradient = layer.self_attention.query_key_value.bias.grad.view(4, 3, 4)
        assert not gradient[:, 1].any()
        assert gradient[:, 0].all() and gradient[:, 2].all()


def test_dropout_only_in_training() -> None:
    model = _whole(_config(hidden_dropout=0.5, attention_dropout=0.5))
    inputs = _inputs()
    assert torch.equal(model(*inputs)[0], model(*inputs)[0])
    model.train()
    assert not torch.equal(model(*inputs)[0], model(*inputs)[0])


def _stage_outputs(tensor: int, layers: list[int]) -> torch.Tensor | None:
    """Full logits of a pipeline whose stages pass activations on by hand, and their checks."""
    config = _config()
    state = ParallelState.create(Topology(tensor * len(layers), tensor, len(layers)))
    stage = stages(layers)[state.pipeline.rank]
    model = BertModel(config, state, stage, parallel_output=False).eval()
    ids, mask, types = _inputs()
    if not stage.is_first:
        activation = torch.empty(SEQUENCE, 3, 16, dtype=torch.float64)
        previous = state.pipeline.ranks[stage.index - 1]
        torch.distributed.recv(activation, previous)
        model.set_input_tensor(activation)
    output = model(ids, mask, types)
    if not stage.is_last:
        torch.distributed.send(output, state.pipeline.ranks[stage.index + 1])
        if not stage.is_first:
            with pytest.raises(RuntimeError, match="holds no word embedding"):
                model.word_embeddings_weight()
        return None
    if len(layers) > 1:
        assert model.word_embeddings_weight() is model.word_embeddings.weight
        assert "word_embeddings_for_head.weight" not in model.state_dict_for_save_checkpoint()
    return output[0].detach()


@pytest.mark.parametrize(
    ("tensor", "layers"), [(2, [3]), (4, [3]), (1, [1, 2]), (2, [2, 1]), (1, [0, 2, 1, 0])]
)
def test_split_models_give_the_logits_of_the_whole(tensor: int, layers: list[int]) -> None:
    expected, _ = _whole(_config(), parallel_output=False)(*_inputs())
    outputs = run_distributed(tensor * len(layers), _stage_outputs, tensor, layers)
    for output in outputs[-tensor:]:
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@distributed(2)
def test_the_heads_copy_of_the_embedding_equals_the_first_stages() -> None:
    state = ParallelState.create(Topology(2, pipeline=2))
    model = BertModel(_config(), state, stages([2, 1])[state.pipeline.rank])
    weight = model.word_embeddings_weight().detach().clone()
    gathered = [torch.empty_like(weight) for _ in range(2)]
    torch.distributed.all_gather(gathered, weight)
    assert torch.equal(*gathered) and bool(weight.any())
    tied = [p.shard_spec for p in model.parameters() if p.shard_spec.tied_to]
    assert [spec.key for spec in tied] == (
        [] if state.pipeline.rank == 0 else ["language_model.embedding.word_embeddings.weight"]
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_wrapped_and_scored_in_float32(precision: str) -> None:
    config = _config(fp64=False, **{precision: True})
    model = build_bert(config, ParallelState.single(), stages([3])[0])
    assert isinstance(model, Float16Module)
    assert {p.dtype for p in model.parameters()} == {model.dtype}
    ids, mask, types = _inputs()
    loss, binary = model(ids, mask, types, lm_labels=ids)
    assert loss.dtype == binary.dtype == torch.float32
    exact = replace(config, model=replace(config.model, fp16=False, bf16=False))
    expected, _ = _whole(exact).train(False)(ids, mask, types, lm_labels=ids)
    model.eval()
    loss, _ = model(ids, mask, types, lm_labels=ids)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)


def test_every_parameter_states_its_split_under_its_own_name() -> None:
    model = _whole(_config())
    for name, parameter in model.named_parameters():
        spec = parameter.shard_spec
        assert spec.name == name
        assert tuple(parameter.shape) == spec.local_shape(1)
