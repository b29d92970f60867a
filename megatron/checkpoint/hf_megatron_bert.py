"""Our BERT and Hugging Face's MegatronBert: the same tensors by other names.

The map is a list of `Entry`s, one for each of our tensors, read in either direction. All but one
kind are renamed and nothing else. The rows of our query_key_value are [heads, 3, head_size], so
that a tensor rank's share of the heads is one block of rows; there, query, key and value are three
matrices with rows [heads, head_size].

What Hugging Face keeps twice, the output embedding and its bias, is stored once on either side:
`transformers` ties `cls.predictions.decoder` to the word embeddings and to `cls.predictions.bias`
by itself, and reports a file without it as complete.

Vocabularies are of the true size on both sides; padding exists in memory only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron.config import ModelConfig
from megatron.errors import CheckpointError

Read = Callable[[str], torch.Tensor]
Shape = tuple[int, ...]

_EMBEDDINGS = {
    "word_embeddings": "word_embeddings",
    "position_embeddings": "position_embeddings",
    "tokentype_embeddings": "token_type_embeddings",
}
_LAYER = {
    "input_layernorm": "attention.ln",
    "self_attention.dense": "attention.output.dense",
    "post_attention_layernorm": "ln",
    "mlp.dense_h_to_4h": "intermediate.dense",
    "mlp.dense_4h_to_h": "output.dense",
}
_HEAD = {
    "lm_head.dense": "cls.predictions.transform.dense",
    "lm_head.layernorm": "cls.predictions.transform.LayerNorm",
}
_BINARY_HEAD = {
    "language_model.pooler.dense": "bert.pooler.dense",
    "binary_head": "cls.seq_relationship",
}


@dataclass(frozen=True)
class Entry:
    """One of our tensors and the one or three of theirs that hold the same numbers.

    heads: where the rows of three matrices are interleaved in ours, the number of attention heads.
    """

    ours: str
    theirs: tuple[str, ...]
    heads: int | None = None

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Their shapes, made from ours."""
        if self.heads is None:
            return (shape,)
        count = len(self.theirs)
        return ((shape[0] // count, *shape[1:]),) * count

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Their tensors, made from ours."""
        if self.heads is None:
            return (tensor,)
        parts = tensor.unflatten(0, (self.heads, len(self.theirs), -1)).unbind(1)
        return tuple(part.flatten(0, 1) for part in parts)

    def join(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Our tensor, made from theirs."""
        if self.heads is None:
            return tensors[0]
        parts = [tensor.unflatten(0, (self.heads, -1)) for tensor in tensors]
        return torch.stack(parts, dim=1).flatten(0, 2)


def entries(model: ModelConfig) -> Iterator[Entry]:
    """An entry for every tensor of a model, in the model's order."""
    for ours, theirs in _EMBEDDINGS.items():
        yield Entry(
            f"language_model.embedding.{ours}.weight", (f"bert.embeddings.{theirs}.weight",)
        )
    for number in range(model.num_layers):
        yield from _layer_entries(number, model.num_attention_heads)
    yield from _renamed({"language_model.encoder.final_layernorm": "bert.encoder.ln"})
    yield from _renamed(_HEAD)
    yield Entry("lm_head.bias", ("cls.predictions.bias",))
    if not model.bert_no_binary_head:
        yield from _renamed(_BINARY_HEAD)


def _layer_entries(number: int, heads: int) -> Iterator[Entry]:
    ours, theirs = f"language_model.encoder.layers.{number}", f"bert.encoder.layer.{number}"
    yield from _renamed({f"{ours}.{o}": f"{theirs}.{t}" for o, t in _LAYER.items()})
    for kind in ("weight", "bias"):
        three = tuple(
            f"{theirs}.attention.self.{name}.{kind}" for name in ("query", "key", "value")
        )
        yield Entry(f"{ours}.self_attention.query_key_value.{kind}", three, heads)


def _renamed(modules: Mapping[str, str]) -> Iterator[Entry]:
    for ours, theirs in modules.items():
        for kind in ("weight", "bias"):
            yield Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",))


def to_hugging_face(model: ModelConfig, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
    """Their names and tensors, one of ours read at a time."""
    for entry in entries(model):
        yield from zip(entry.theirs, entry.split(read(entry.ours)), strict=True)


def from_hugging_face(model: ModelConfig, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
    """Our names and tensors, one to three of theirs read at a time."""
    for entry in entries(model):
        yield entry.ours, entry.join(tuple(read(name) for name in entry.theirs))


def architecture(model: ModelConfig) -> str:
    """Their class for the model; the one with both heads cannot be without the binary head."""
    return "MegatronBertForMaskedLM" if model.bert_no_binary_head else "MegatronBertForPreTraining"


def hugging_face_config(
    model: ModelConfig, *, pad_token_id: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The config.json of the model, whose weights are stored as `dtype`.

    Raises:
        CheckpointError: their architecture cannot express the model.
    """
    if model.head_size * model.num_attention_heads != model.hidden_size:
        raise CheckpointError(
            f"--kv-channels {model.kv_channels}: MegatronBert knows only heads of hidden-size "
            f"{model.hidden_size} / num-attention-heads {model.num_attention_heads}"
        )
    return {
        "architectures": [architecture(model)],
        "model_type": "megatron-bert",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_size,
        "hidden_act": "gelu_new" if model.activation == "gelu_tanh" else "gelu",
        "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "max_position_embeddings": model.max_position_embeddings,
        "type_vocab_size": 2,
        "initializer_range": model.init_method_std,
        "layer_norm_eps": model.layernorm_epsilon,
        "pad_token_id": pad_token_id,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
