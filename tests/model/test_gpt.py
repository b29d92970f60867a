"""GPT in all its kinds: against transformers, against masks written out, and split."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.model import GPTModel
from megatron.mpu import ParallelState
from megatron.mpu.stage import stages
from megatron.ops.attention import AttentionCore, AttentionMask
from tests.configs import small

VOCABULARY, SEQUENCE = 53, 12
LLAMA = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "num_query_groups": 2,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "ffn_hidden_size": 24,
}


def _config(**changes: Any):
    options = {
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 8,
        "num_layers": 3,
        "max_position_embeddings": SEQUENCE,
        "seq_length": SEQUENCE,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "fp64": True,
        "init_method_std": 0.2,
    }
    return small(**options | changes)


def _whole(config, **options: bool) -> GPTModel:
    (stage,) = stages([config.model.num_layers])
    return GPTModel(config, ParallelState.single(), stage, **options)


def _ids(batch: int = 2) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, SEQUENCE), generator=torch.Generator().manual_seed(4))


def _named(model: GPTModel) -> dict[str, torch.Tensor]:
    return {p.shard_spec.name.removeprefix("language_model."): p for p in model.parameters()}


def _set(target: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)


def _gpt2_twin(model: GPTModel):
    """transformers' GPT-2 with the model's weights, and the pairs of their parameters."""
    transformers = pytest.importorskip("transformers")
    options = model.config.model
    twin = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=SEQUENCE,
            n_embd=options.hidden_size,
            n_layer=options.num_layers,
            n_head=options.num_attention_heads,
            activation_function="gelu",
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            layer_norm_epsilon=options.layernorm_epsilon,
            attn_implementation="eager",
        )
    ).double()
    own, n, d = _named(model), options.num_attention_heads, options.head_size
    _set(twin.transformer.wte.weight, own["embedding.word_embeddings.weight"][:VOCABULARY])
    _set(twin.transformer.wpe.weight, own["embedding.position_embeddings.weight"])
    for i, block in enumerate(twin.transformer.h):
        at = f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            _set(getattr(block.ln_1, kind), own[f"{at}.input_layernorm.{kind}"])
            _set(getattr(block.ln_2, kind), own[f"{at}.post_attention_layernorm.{kind}"])
            mixed = own[f"{at}.self_attention.query_key_value.{kind}"].unflatten(0, (n, 3, d))
            _set(getattr(block.attn.c_attn, kind), mixed.transpose(0, 1).flatten(0, 2).t())
            dense = own[f"{at}.self_attention.dense.{kind}"]
            _set(getattr(block.attn.c_proj, kind), dense.t())
            _set(getattr(block.mlp.c_fc, kind), own[f"{at}.mlp.dense_h_to_4h.{kind}"].t())
            _set(getattr(block.mlp.c_proj, kind), own[f"{at}.mlp.dense_4h_to_h.{kind}"].t())
    for kind in ("weight", "bias"):
        _set(getattr(twin.transformer.ln_f, kind), own[f"encoder.final_layernorm.{kind}"])
    return twin, twin.transformer.wte.weight


def _llama_twin(model: GPTModel):
    """transformers' Llama with the model's weights."""
    transformers = pytest.importorskip("transformers")
    options = model.config.model
    twin = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=SEQUENCE,
            hidden_size=options.hidden_size,
            intermediate_size=options.ffn_size,
            num_hidden_layers=options.num_layers,
            num_attention_heads=options.num_attention_heads,
            num_key_value_heads=options.key_value_heads,
            rms_norm_eps=options.layernorm_epsilon,
            attn_implementation="eager",
        )
    ).double()
    own, g, d = _named(model), options.key_value_heads, options.head_size
    queries = options.num_attention_heads // g
    _set(twin.model.embed_tokens.weight, own["embedding.word_embeddings.weight"][:VOCABULARY])
    _set(twin.lm_head.weight, own["output_layer.weight"][:VOCABULARY])
    for i, layer in enumerate(twin.model.layers):
        at = f"encoder.layers.{i}"
        mixed = own[f"{at}.self_attention.query_key_value.weight"].unflatten(0, (g, queries + 2, d))
        for name, part in zip("qkv", mixed.split((queries, 1, 1), dim=1), strict=True):
            _set(getattr(layer.self_attn, f"{name}_proj").weight, part.flatten(0, 2))
        _set(layer.self_attn.o_proj.weight, own[f"{at}.self_attention.dense.weight"])
        gate, up = own[f"{at}.mlp.dense_h_to_4h.weight"].chunk(2)
        _set(layer.mlp.gate_proj.weight, gate)
        _set(layer.mlp.up_proj.weight, up)
        _set(layer.mlp.down_proj.weight, own[f"{at}.mlp.dense_4h_to_h.weight"])
        _set(layer.input_layernorm.weight, own[f"{at}.input_layernorm.weight"])
        _set(layer.post_attention_layernorm.weight, own[f"{at}.post_attention_layernorm.weight"])
    _set(twin.model.norm.weight, own["encoder.final_layernorm.weight"])
    return twin, twin.model.embed_tokens.weight


@pytest.mark.parametrize(("changes", "twin_of"), [({}, _gpt2_twin), (LLAMA, _llama_twin)])
def test_logits_and_gradients_equal_those_of_transformers(changes: dict, twin_of) -> None:
    model = _whole(_config(**changes), parallel_output=False)
    # Norms and biases away from ones and zeros, so that they matter.
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            _set(parameter, parameter + 0.1 * torch.randn(parameter.shape, generator=generator))
    twin, embedding = twin_of(model)
    ids = _ids()
    logits = model(ids)
    expected = twin(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    loss = model(ids[:, :-1], labels=ids[:, 1:])
    loss.mean().backward()
    twin(ids, labels=ids).loss.backward()
    found = _named(model)["embedding.word_embeddings.weight"].grad[:VOCABULARY]
    # As a whole: transformers takes its angles in float32, whatever the model is in.
    assert (found - embedding.grad).norm() <= 1e-5 * embedding.grad.norm()


KINDS = [
    {},
    LLAMA,
    {"geglu": True, "rotary_percent": 0.5, "position_embedding_type": "rope"},
    {"apply_residual_connection_post_layernorm": True, "normalization": "RMSNorm"},
    {"num_query_groups": 1, "attention_backend": "unfused"},
]


def _loss_and_gradients(model: GPTModel, **inputs: Any) -> list[torch.Tensor]:
    ids = _ids()
    model.zero_grad()
    model.state.streams.start(seed=3, step=0, micro_batch=0)
    loss = model(ids, labels=ids.roll(-1, 1), **inputs)
    loss.sum().backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def _assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("changes", KINDS)
def test_the_future_is_not_seen(changes: dict[str, Any]) -> None:
    model = _whole(_config(**changes))
    ids = _ids()
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % VOCABULARY
    first, second = model(ids), model(other)
    torch.testing.assert_close(first[:, :7], second[:, :7], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(first[:, 7:], second[:, 7:])


@pytest.mark.parametrize("changes", KINDS)
def test_documents_are_as_if_each_were_alone(changes: dict[str, Any]) -> None:
    model = _whole(_config(**changes))
    ids = _ids()
    lengths = torch.tensor([[5, 7, 0, 0], [1, 3, 8, 0]])
    positions = torch.tensor([[*range(5), *range(7)], [0, *range(3), *range(8)]])
    together = model(ids, positions, lengths)
    for row, own in enumerate(lengths.tolist()):
        start = 0
        for length in filter(None, own):
            alone = model(ids[row : row + 1, start : start + length])
            found = together[row : row + 1, start : start + length]
            torch.testing.assert_close(found, alone, rtol=1e-11, atol=1e-12)
            start += length


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    "recomputation",
    [
        {"recompute_granularity": "full"},
        {"recompute_granularity": "full", "recompute_num_layers": 2},
        {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": 2,
        },
        {"recompute_granularity": "selective"},
    ],
)
@pytest.mark.parametrize("changes", [{}, LLAMA])
def test_recomputation_is_bitwise_equal(
    changes: dict[str, Any], recomputation: dict[str, Any], dropout: float
) -> None:
    options = changes | {"hidden_dropout": dropout, "attention_dropout": dropout, "fp64": False}
    expected = _loss_and_gradients(_whole(_config(**options)))
    found = _loss_and_gradients(_whole(_config(**options | recomputation)))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("changes", [{}, LLAMA])
def test_fused_and_unfused_attention_are_equal(changes: dict[str, Any]) -> None:
    lengths = torch.tensor([[5, 7], [12, 0]])
    for inputs in ({}, {"document_lengths": lengths}):
        _assert_same(
            _loss_and_gradients(_whole(_config(**changes, attention_backend="unfused")), **inputs),
            _loss_and_gradients(_whole(_config(**changes)), **inputs),
        )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_float32_residual_stream_is_closer(precision: str) -> None:
    """Half-precision products around a float32 stream round less than a stream that rounds."""
    options = {"fp64": False, precision: True, "num_layers": 12, "init_method_std": 0.1}
    exact = _whole(_config(fp64=True, num_layers=12, init_method_std=0.1))
    models = {
        wide: _whole(_config(**options, fp32_residual_connection=wide)) for wide in (False, True)
    }
    for model in models.values():
        for own, value in zip(model.parameters(), exact.parameters(), strict=True):
            _set(own, value)
            _set(value, own)
    ids = _ids()
    expected = exact(ids)
    error = {wide: (model(ids).double() - expected).norm().item() for wide, model in models.items()}
    assert error[True] < error[False]


def test_the_softmax_in_float32_is_closer() -> None:
    generator = torch.Generator().manual_seed(6)
    query, key, value = (torch.randn(64, 2, 4, 8, generator=generator).bfloat16() for _ in range(3))
    mask = AttentionMask(causal=True)
    expected = AttentionCore(backend="unfused")(query.double(), key.double(), value.double(), mask)
    errors = []
    for wide in (True, False):
        options = {"fp64": False, "bf16": True, "attention_softmax_in_fp32": wide}
        model = _whole(_config(**options, attention_backend="unfused"))
        core = model.language_model.encoder.layers[0].self_attention.core
        errors.append((core(query, key, value, mask).double() - expected).norm().item())
    assert errors[0] < errors[1]


def test_a_keys_bias_gets_no_gradient_by_rounding_where_it_is_not_turned() -> None:
    model = _whole(_config(position_embedding_type="rope", rotary_percent=0.5))
    model(_ids(), labels=_ids()).sum().backward()
    for layer in model.language_model.encoder.layers:
        query, key, value = layer.self_attention.query_key_value.bias.grad.view(4, 3, 8).unbind(1)
        assert (key[:, 4:] == 0).all()
        assert all((part != 0).all() for part in (query, key[:, :4], value))
