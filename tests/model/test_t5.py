"""T5: its encoder and decoder on one stage and on several, its positions, its masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.model import AttnMaskType, T5Model
from megatron.model.positions import RelativeBias
from megatron.mpu import ParallelState, Topology
from megatron.mpu.collectives import all_gather_last_dim
from megatron.mpu.stage import encoder_decoder_stages
from tests.configs import small
from tests.distributed import run_distributed

VOCABULARY, ENCODER, DECODER = 53, 12, 8


def _config(**changes: Any):
    options = {
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 8,
        "num_layers": 3,
        "decoder_num_layers": 2,
        "max_position_embeddings": ENCODER,
        "seq_length": ENCODER,
        "decoder_seq_length": DECODER,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "fp64": True,
        "init_method_std": 0.2,
    }
    return small(**options | changes)


def _inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)

    def draw(length: int) -> torch.Tensor:
        return torch.randint(VOCABULARY, (3, length), generator=generator)

    return {
        "encoder_input_ids": draw(ENCODER),
        "decoder_input_ids": draw(DECODER),
        "encoder_mask": torch.arange(ENCODER) < torch.tensor([[12], [5], [9]]),
    }


def _whole(config, **options: bool) -> T5Model:
    (stage,) = encoder_decoder_stages((3,), (2,), split=0)
    return T5Model(config, ParallelState.single(), stage, **options)


KINDS = [
    {},
    {"position_embedding_type": "relative", "relative_attention_num_buckets": 8},
    {
        "position_embedding_type": "relative",
        "normalization": "RMSNorm",
        "geglu": True,
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": True,
    },
    {"position_embedding_type": "rope", "num_query_groups": 2, "swiglu": True},
]


@pytest.mark.parametrize("changes", KINDS)
def test_the_decoder_sees_the_real_input_and_its_own_past(changes: dict[str, Any]) -> None:
    model = _whole(_config(**changes))
    inputs = _inputs()
    expected = model(**inputs)
    mask = inputs["encoder_mask"]

    def logits(name: str, where: torch.Tensor) -> torch.Tensor:
        other = torch.where(where, (inputs[name] + 1) % VOCABULARY, inputs[name])
        return model(**inputs | {name: other})

    padding = logits("encoder_input_ids", ~mask)
    torch.testing.assert_close(padding, expected, rtol=1e-12, atol=1e-12)
    real = torch.zeros_like(mask)
    real[:, 2] = True
    assert not torch.allclose(logits("encoder_input_ids", real)[:, 0], expected[:, 0])
    future = (torch.arange(DECODER) >= 5).expand(3, -1)
    found = logits("decoder_input_ids", future)
    torch.testing.assert_close(found[:, :5], expected[:, :5], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found[:, 5:], expected[:, 5:])


def test_the_encoder_may_run_once_for_several_decoders() -> None:
    model = _whole(_config(position_embedding_type="relative"))
    inputs = _inputs()
    hidden = model(**inputs, output_enc_hidden=True)
    assert hidden.shape == (ENCODER, 3, 32)
    torch.testing.assert_close(model(**inputs, enc_hidden_states=hidden), model(**inputs))


@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_those_of_the_paper(causal: bool) -> None:
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = _config(position_embedding_type="relative", relative_attention_max_distance=50)
    (stage,) = encoder_decoder_stages((3,), (2,), split=0)
    mask_type = AttnMaskType.causal if causal else AttnMaskType.padding
    bias = RelativeBias(config, ParallelState.single(), stage, "b", mask_type)
    distance = torch.arange(-90, 91)
    expected = modeling.T5Attention._relative_position_bucket(
        distance, bidirectional=not causal, num_buckets=32, max_distance=50
    )
    assert torch.equal(bias._bucket(distance), expected)


def _staged_logits(tensor: int, pipeline: int, split: int, changes: dict[str, Any]) -> Any:
    """Logits by hand-carried activations, for all layouts of the stages."""
    config = _config(
        **changes,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=tensor > 1,
    )
    topology = Topology(tensor * pipeline, tensor, pipeline, split=split or None)
    state = ParallelState.create(topology)
    layers = {0: ((3,), (2,)), 1: ((3,), (2,)), 2: ((1, 2), (0, 2)), 3: ((1, 0, 2), (2,))}[split]
    stage = encoder_decoder_stages(*layers, split=split)[state.pipeline.rank]
    model = T5Model(config, state, stage)
    inputs = _inputs()
    here, width = state.pipeline.rank, config.model.hidden_size
    rows = ENCODER if here <= split else ENCODER + DECODER
    if here > 0:
        received = torch.empty(rows // tensor, 3, width, dtype=torch.float64)
        edge = state.pipeline.ranks[here - 1], state.rank
        torch.distributed.recv(received, edge[0], group=state.forward_edges[edge])
        model.set_input_tensor(received)
    output = model(**inputs)
    if here < pipeline - 1:
        edge = state.rank, state.pipeline.ranks[here + 1]
        torch.distributed.send(output.detach(), edge[1], group=state.forward_edges[edge])
        return None
    return all_gather_last_dim(output.detach(), state.tensor)


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize(
    ("tensor", "pipeline", "split"), [(2, 1, 0), (1, 2, 1), (2, 2, 1), (1, 4, 2), (1, 4, 3)]
)
def test_split_models_give_the_logits_of_the_whole(
    tensor: int, pipeline: int, split: int, changes: dict[str, Any]
) -> None:
    expected = _whole(_config(**changes))(**_inputs())[..., :VOCABULARY].detach()
    world = tensor * pipeline
    for found in run_distributed(world, _staged_logits, tensor, pipeline, split, changes):
        if found is not None:
            torch.testing.assert_close(found[..., :VOCABULARY], expected, rtol=1e-11, atol=1e-11)


def test_recomputation_is_bitwise_equal() -> None:
    results = []
    for granularity in (None, "full", "selective"):
        config = _config(
            fp64=False,
            hidden_dropout=0.2,
            attention_dropout=0.2,
            position_embedding_type="relative",
            recompute_granularity=granularity,
        )
        model = _whole(config)
        model.state.streams.start(seed=3, step=0, micro_batch=0)
        inputs = _inputs()
        loss = model(**inputs, lm_labels=inputs["decoder_input_ids"].roll(-1, 1))
        loss.sum().backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            assert torch.equal(one, other)


def test_across_keys_are_not_turned_and_their_bias_gets_no_gradient_by_rounding() -> None:
    model = _whole(_config(position_embedding_type="rope"))
    model(**_inputs(), lm_labels=_inputs()["decoder_input_ids"]).sum().backward()
    for layer in model.language_model.decoder.layers:
        key, value = layer.inter_attention.key_value.bias.grad.view(4, 2, 8).unbind(1)
        assert (key == 0).all() and (value != 0).all()
