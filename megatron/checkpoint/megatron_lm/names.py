"""The tensors of a model that Megatron-LM knows, and where its checkpoints keep them.

Our global names are Megatron-LM's own, but for these differences:

- There, layer numbers restart at 0 on each stage.
- There, the last stage keeps its copy of the word embeddings as `word_embeddings_for_head`, and
  the stage where a T5's decoder begins a copy of the whole embedding.
- A name is a path through nested dictionaries, whose last part keeps its dots:
  `language_model` > `encoder` > `layers.0.input_layernorm.weight`.
- The releases that know RMSNorm call all norms `..._norm`, the others `..._layernorm`. Older
  releases have further names (`canonical`).

`model_specs` lists all tensors of a model. How each is split is here as in memory: the vocabulary,
heads and the MLP's width over the tensor ranks, a gated MLP's two halves one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from megatron.mpu.shard_spec import ShardSpec
from megatron.mpu.stage import Stage

Shape = tuple[int, ...]

WORD_EMBEDDINGS = "language_model.embedding.word_embeddings.weight"
POSITION_EMBEDDINGS = "language_model.embedding.position_embeddings.weight"
TOKENTYPE_EMBEDDINGS = "language_model.embedding.tokentype_embeddings.weight"
OUTPUT_LAYER = "language_model.output_layer.weight"
POOLER, LM_HEAD, BINARY_HEAD = "language_model.pooler", "lm_head", "binary_head"
LM_HEAD_BIAS = "lm_head.bias"
EMBEDDING_COPY = "word_embeddings_for_head.weight"

# What stands on the layers; checkpoints exist without.
HEADS = (POOLER, LM_HEAD, BINARY_HEAD)

_VOCABULARY = (WORD_EMBEDDINGS, OUTPUT_LAYER, LM_HEAD_BIAS)
_SPLIT_ROWS = ("query_key_value", "query", "key_value", "dense_h_to_4h")
_SPLIT_COLUMNS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
_LAYER = re.compile(r"language_model\.(encoder|decoder)\.layers\.(\d+)\.(.+)")
_OLD_NAMES = [
    (re.compile(r"^language_model\.(?=\w+_embeddings\.)"), "language_model.embedding."),
    (re.compile(r"^language_model\.transformer\."), "language_model.encoder."),
    (re.compile(r"(\.layers\.\d+)\.attention\."), r"\1.self_attention."),
    (re.compile(r"_norm\."), "_layernorm."),
    (re.compile(r"^lm_head\.norm\."), "lm_head.layernorm."),
]


def split_dim(name: str) -> int | None:
    """The dimension of a tensor that is split over the tensor ranks; None where none is."""
    if name in _VOCABULARY:
        return 0
    if not _LAYER.match(name):
        return None
    if name.endswith(_SPLIT_COLUMNS):
        return 1
    return 0 if name.split(".")[-2] in _SPLIT_ROWS else None


def joined_shape(name: str, part: Shape, tensor: int) -> Shape:
    """The shape of a tensor of which each of `tensor` ranks holds a `part`, padding included."""
    dim = split_dim(name)
    return tuple(size * tensor if d == dim else size for d, size in enumerate(part))


def model_specs(model: ModelConfig, padded_vocab: int) -> dict[str, ShardSpec]:
    """All tensors of a model, its heads included, by our names; needs `model.vocab_size`."""
    specs = (_spec(model, padded_vocab, name, shape) for name, shape in _shapes(model))
    return {spec.name: spec for spec in specs}


def _spec(model: ModelConfig, padded_vocab: int, name: str, shape: Shape) -> ShardSpec:
    halves = (model.ffn_size,) * (2 if model.is_gated else 1)
    return ShardSpec(
        name,
        shape,
        dim=split_dim(name),
        blocks=halves if ".dense_h_to_4h." in name else (),
        padded=padded_vocab if name in _VOCABULARY else None,
    )


def _shapes(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    assert model.vocab_size is not None
    h = model.hidden_size
    yield WORD_EMBEDDINGS, (model.vocab_size, h)
    if model.position_embedding_type == "learned_absolute":
        yield POSITION_EMBEDDINGS, (model.max_position_embeddings, h)
    if model.model_type == "bert" and model.num_tokentypes:
        yield TOKENTYPE_EMBEDDINGS, (model.num_tokentypes, h)
    yield from _stack(model, "encoder", model.num_layers)
    if model.model_type == "t5":
        yield from _stack(model, "decoder", model.decoder_layers)
        yield LM_HEAD_BIAS, (model.vocab_size,)
    if model.untie_embeddings_and_output_weights:
        yield OUTPUT_LAYER, (model.vocab_size, h)
    if model.model_type == "bert":
        yield from _linear(POOLER + ".dense", h, h)
        yield from _linear("lm_head.dense", h, h)
        yield from _norm(model, "lm_head.layernorm")
        yield LM_HEAD_BIAS, (model.vocab_size,)
        yield from _linear(BINARY_HEAD, 2, h)


def _stack(model: ModelConfig, stack: str, layers: int) -> Iterator[tuple[str, Shape]]:
    for number in range(layers):
        yield from _layer(model, f"language_model.{stack}.layers.{number}", stack == "decoder")
    yield from _norm(model, f"language_model.{stack}.final_layernorm")


def _layer(model: ModelConfig, name: str, crosses: bool) -> Iterator[tuple[str, Shape]]:
    h, f, bias = model.hidden_size, model.ffn_size, not model.disable_bias_linear
    width, kv_width = (
        heads * model.head_size for heads in (model.num_attention_heads, model.key_value_heads)
    )
    yield from _norm(model, f"{name}.input_layernorm")
    yield from _linear(f"{name}.self_attention.query_key_value", width + 2 * kv_width, h, bias)
    yield from _linear(f"{name}.self_attention.dense", h, width, bias)
    yield from _norm(model, f"{name}.post_attention_layernorm")
    if crosses:
        yield from _linear(f"{name}.inter_attention.query", width, h, bias)
        yield from _linear(f"{name}.inter_attention.key_value", 2 * kv_width, h, bias)
        yield from _linear(f"{name}.inter_attention.dense", h, width, bias)
        yield from _norm(model, f"{name}.post_inter_attention_layernorm")
    yield from _linear(f"{name}.mlp.dense_h_to_4h", f * (2 if model.is_gated else 1), h, bias)
    yield from _linear(f"{name}.mlp.dense_4h_to_h", h, f, bias)


def _linear(name: str, rows: int, columns: int, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(model: ModelConfig, name: str) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (model.hidden_size,)
    if model.normalization == "LayerNorm":
        yield f"{name}.bias", (model.hidden_size,)


def is_of_model(name: str) -> bool:
    """Whether a tensor is of the pretrained model; heads of other tasks stand beside it."""
    return name == EMBEDDING_COPY or name.startswith(
        ("language_model.", "lm_head.", "binary_head.")
    )


def has_no_head_bias(model: ModelConfig) -> bool:
    """Whether Megatron-LM gives the model's head a bias, a T5's, where ours has none."""
    return model.model_type == "t5" and model.disable_bias_linear


def without_padding(
    shapes: Mapping[str, Shape], model: ModelConfig, padded_vocab: int
) -> dict[str, Shape]:
    """The shapes with the true vocabulary in place of the padded one."""
    assert model.vocab_size is not None
    return {
        name: (model.vocab_size, *shape[1:])
        if name in _VOCABULARY and shape[:1] == (padded_vocab,)
        else shape
        for name, shape in shapes.items()
    }


def missing_heads(
    shapes: Mapping[str, Shape], specs: Mapping[str, ShardSpec], where: object
) -> tuple[str, ...]:
    """The heads that are not among the tensors of the checkpoint `where`; all else has to be.

    Raises:
        CheckpointError: tensors are missing, unknown, or of another shape than their specs say.
    """
    absent = tuple(head for head in HEADS if not any(_is_of(head, name) for name in shapes))
    lacking = [
        name
        for name in specs
        if name not in shapes and not any(_is_of(head, name) for head in absent)
    ]
    unknown = [name for name in shapes if name not in specs]
    wrong = [
        f"{name} is {list(shape)}, expected {list(specs[name].shape)}"
        for name, shape in shapes.items()
        if name in specs and shape != specs[name].shape
    ]
    problems = [
        f"{where}: {what}: {_listed(names)}"
        for what, names in (
            ("tensors are missing", lacking),
            ("tensors that are no part of such a model", unknown),
            ("tensors of another shape than the model's", wrong),
        )
        if names
    ]
    if problems:
        raise CheckpointError(problems)
    needed = {head for head in HEADS if any(_is_of(head, name) for name in specs)}
    return tuple(head for head in absent if head in needed)


def _is_of(module: str, name: str) -> bool:
    return name.startswith(module + ".")


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def name_on_stage(name: str, stage: Stage, *, tied: bool) -> str | None:
    """The name that a stage has for one of our global tensors; None where it does not hold it.

    tied: whether the output layer is the word embeddings, of which the last stage has a copy.
    """
    if layer := _LAYER.match(name):
        stack, number, rest = layer[1], int(layer[2]), layer[3]
        numbers = stage.decoder_layers if stack == "decoder" else stage.layers
        if number not in numbers:
            return None
        return f"language_model.{stack}.layers.{number - numbers.start}.{rest}"
    if name.startswith("language_model.embedding."):
        if stage.is_first or stage.begins_decoder:
            return name
        is_copied = name == WORD_EMBEDDINGS and stage.is_last and tied
        return EMBEDDING_COPY if is_copied else None
    ends = stage.ends_encoder if name.startswith("language_model.encoder.") else stage.is_last
    return name if ends else None


def global_name(name: str, stage: Stage) -> str:
    """Our global name of what a stage calls `name`, the owner's where the stage holds a copy."""
    if name == EMBEDDING_COPY:
        return WORD_EMBEDDINGS
    if not (layer := _LAYER.match(name)):
        return name
    stack, number, rest = layer[1], int(layer[2]), layer[3]
    first = (stage.decoder_layers if stack == "decoder" else stage.layers).start
    return f"language_model.{stack}.layers.{first + number}.{rest}"


def layers_of(stack: str, names: Iterable[str]) -> int:
    """How many layers of the stack, "encoder" or "decoder", are among the tensors."""
    layers = (_LAYER.match(name) for name in names)
    return 1 + max((int(m[2]) for m in layers if m and m[1] == stack), default=-1)


def canonical(name: str) -> str:
    """The current name for one of whatever release of Megatron-LM, with `..._layernorm`."""
    for pattern, current in _OLD_NAMES:
        name = pattern.sub(current, name)
    return name


def stored_path(name: str, model: ModelConfig) -> tuple[str, ...]:
    """The way through the nested dictionaries to what a stage calls `name`."""
    if model.normalization == "RMSNorm":
        name = name.replace("lm_head.layernorm.", "lm_head.norm.").replace("_layernorm.", "_norm.")
    if name.startswith("language_model.embedding."):
        return tuple(name.split(".", 3))
    return tuple(name.split(".", 2 if name.startswith("language_model.") else 1))
