"""Megatron-LM checkpoints put together by loops, from what is known of the format alone.

Every function makes the global tensors under our names and the files of all ranks, as dictionaries
`files[pipeline rank][tensor rank]` to be saved with `torch.save`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Files = list[list[dict[str, Any]]]

HIDDEN, HEADS, HEAD_SIZE, FFN, POSITIONS, VOCAB, PADDED = 8, 4, 2, 12, 6, 11, 16


def numbers(*shape: int) -> torch.Tensor:
    """Random numbers, or from the seed that was set last."""
    return torch.randn(shape)


def arguments(**values: Any) -> argparse.Namespace:
    """What a run of these sizes saves."""
    common = {
        "num_layers": 4,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "ffn_hidden_size": FFN,
        "max_position_embeddings": POSITIONS,
        "padded_vocab_size": PADDED,
        "make_vocab_size_divisible_by": 8,
        "layernorm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
        "openai_gelu": False,
        "bias_gelu_fusion": True,
        "tokenizer_type": "BertWordPieceLowerCase",
        "params_dtype": torch.float32,
    }
    return argparse.Namespace(**(common | values))


def fused(heads: list[list[torch.Tensor]], version: int) -> torch.Tensor:
    """The rows of a rank; `heads[i][j]` are the rows of part j of its head i."""
    rows = []
    parts = range(len(heads[0]))
    if version == 0:
        rows = [head[part][i] for part in parts for head in heads for i in range(HEAD_SIZE)]
    elif version == 1:
        rows = [head[part][i] for head in heads for i in range(HEAD_SIZE) for part in parts]
    else:
        rows = [head[part][i] for head in heads for part in parts for i in range(HEAD_SIZE)]
    return torch.stack(rows)


def bert(
    version: int,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int = 1,
    attention: str = "self_attention",
    args: Any = None,
) -> tuple[Tensors, Files]:
    """A BERT of 4 layers."""
    ours: Tensors = {}
    parts: dict[str, list[torch.Tensor]] = {}  # by our names, what each tensor rank has

    def whole(name: str, *shape: int) -> None:
        ours[name] = numbers(*shape)
        parts[name] = [ours[name]] * tensor

    def cut(name: str, dim: int, *shape: int) -> None:
        ours[name] = numbers(*shape)
        parts[name] = list(ours[name].chunk(tensor, dim))

    def vocabulary(name: str, *shape: int) -> None:
        padded = numbers(PADDED, *shape)
        ours[name] = padded[:VOCAB]
        parts[name] = list(padded.chunk(tensor))

    def heads(name: str, count: int, *shape: int) -> None:
        each = [[numbers(HEAD_SIZE, *shape) for _ in range(count)] for _ in range(HEADS)]
        ours[name] = torch.cat([part for head in each for part in head])
        own = HEADS // tensor
        parts[name] = [fused(each[t * own : (t + 1) * own], version) for t in range(tensor)]

    def linear(name: str, rows: int, columns: int) -> None:
        whole(f"{name}.weight", rows, columns)
        whole(f"{name}.bias", rows)

    def norm(name: str) -> None:
        whole(f"{name}.weight", HIDDEN)
        whole(f"{name}.bias", HIDDEN)

    embedding, encoder = "language_model.embedding", "language_model.encoder"
    vocabulary(f"{embedding}.word_embeddings.weight", HIDDEN)
    whole(f"{embedding}.position_embeddings.weight", POSITIONS, HIDDEN)
    whole(f"{embedding}.tokentype_embeddings.weight", 2, HIDDEN)
    for number in range(4):
        layer = f"{encoder}.layers.{number}"
        norm(f"{layer}.input_layernorm")
        heads(f"{layer}.self_attention.query_key_value.weight", 3, HIDDEN)
        heads(f"{layer}.self_attention.query_key_value.bias", 3)
        cut(f"{layer}.self_attention.dense.weight", 1, HIDDEN, HIDDEN)
        whole(f"{layer}.self_attention.dense.bias", HIDDEN)
        norm(f"{layer}.post_attention_layernorm")
        cut(f"{layer}.mlp.dense_h_to_4h.weight", 0, FFN, HIDDEN)
        cut(f"{layer}.mlp.dense_h_to_4h.bias", 0, FFN)
        cut(f"{layer}.mlp.dense_4h_to_h.weight", 1, HIDDEN, FFN)
        whole(f"{layer}.mlp.dense_4h_to_h.bias", HIDDEN)
    norm(f"{encoder}.final_layernorm")
    linear("language_model.pooler.dense", HIDDEN, HIDDEN)
    linear("lm_head.dense", HIDDEN, HIDDEN)
    norm("lm_head.layernorm")
    vocabulary("lm_head.bias")
    linear("binary_head", 2, HIDDEN)

    def model(t: int, stage: int) -> dict[str, Any]:
        per_stage = 4 // (pipeline * virtual)
        layers = {}
        for number in range(per_stage):
            there = f"{encoder}.layers.{stage * per_stage + number}."
            for name in parts:
                if name.startswith(there):
                    rest = name.removeprefix(there).replace("self_attention", attention)
                    layers[f"layers.{number}.{rest}"] = parts[name][t]
        tree: dict[str, Any] = {"language_model": {"encoder": layers}}
        if stage == 0:
            tree["language_model"]["embedding"] = {
                table: {"weight": parts[f"{embedding}.{table}.weight"][t]}
                for table in ("word_embeddings", "position_embeddings", "tokentype_embeddings")
            }
        if stage == pipeline * virtual - 1:
            for kind in ("weight", "bias"):
                name = f"final_layernorm.{kind}"
                layers[name] = parts[f"{encoder}.{name}"][t]
            tree["language_model"]["pooler"] = {
                f"dense.{kind}": parts[f"language_model.pooler.dense.{kind}"][t]
                for kind in ("weight", "bias")
            }
            for head in ("lm_head", "binary_head"):
                tree[head] = {
                    name.removeprefix(f"{head}."): parts[name][t]
                    for name in parts
                    if name.startswith(f"{head}.")
                }
            if stage:
                words = parts[f"{embedding}.word_embeddings.weight"][t]
                tree["word_embeddings_for_head"] = {"weight": words}
        return tree

    files: Files = []
    for p in range(pipeline):
        files.append([])
        for t in range(tensor):
            file: dict[str, Any] = {"iteration": 5, "checkpoint_version": float(version)}
            if args is not None:
                file["args"] = args
            if virtual == 1:
                file["model"] = model(t, p)
            else:
                for chunk in range(virtual):
                    file[f"model{chunk}"] = model(t, chunk * pipeline + p)
            files[p].append(file)
    return ours, files


def t5(version: int) -> tuple[Tensors, Files]:
    """A T5 of 2 + 2 layers on 2 tensor and 3 pipeline ranks; the decoder begins at rank 1."""
    ours: Tensors = {}
    files: Files = [
        [{"iteration": 5, "checkpoint_version": version} for _ in range(2)] for _ in range(3)
    ]
    for file in (file for row in files for file in row):
        file["args"] = arguments(
            num_layers=2, bias_gelu_fusion=False, pipeline_model_parallel_split_rank=1
        )
        file["model"] = {"language_model": {}}

    def put(p: int, path: list[str], parts: list[torch.Tensor]) -> None:
        for file, part in zip(files[p], parts, strict=True):
            place = file["model"]
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = part

    words, positions, bias = numbers(PADDED, HIDDEN), numbers(POSITIONS, HIDDEN), numbers(PADDED)
    ours["language_model.embedding.word_embeddings.weight"] = words[:VOCAB]
    ours["language_model.embedding.position_embeddings.weight"] = positions
    ours["lm_head.bias"] = bias[:VOCAB]
    for p in (0, 1):
        embedding = ["language_model", "embedding"]
        put(p, [*embedding, "word_embeddings", "weight"], [words[:8], words[8:]])
        put(p, [*embedding, "position_embeddings", "weight"], [positions, positions])
    put(2, ["word_embeddings_for_head", "weight"], [words[:8], words[8:]])
    put(2, ["lm_head", "bias"], [bias[:8], bias[8:]])

    def whole(p: int, stack: str, there: str, here: str, *shape: int) -> None:
        value = ours[f"language_model.{stack}.{here}"] = numbers(*shape)
        put(p, ["language_model", stack, there], [value, value])

    def cut(p: int, stack: str, there: str, here: str, dim: int, *shape: int) -> None:
        value = ours[f"language_model.{stack}.{here}"] = numbers(*shape)
        half = value.shape[dim] // 2
        first, second = value.narrow(dim, 0, half), value.narrow(dim, half, half)
        put(p, ["language_model", stack, there], [first.clone(), second.clone()])

    def heads(p: int, stack: str, there: str, here: str, count: int, *shape: int) -> None:
        each = [[numbers(HEAD_SIZE, *shape) for _ in range(count)] for _ in range(HEADS)]
        value = torch.cat([part for head in each for part in head])
        ours[f"language_model.{stack}.{here}"] = value
        put(
            p,
            ["language_model", stack, there],
            [fused(each[:2], version), fused(each[2:], version)],
        )

    for stack, number, p, local in (
        ("encoder", 0, 0, 0),
        ("encoder", 1, 0, 1),
        ("decoder", 0, 1, 0),
        ("decoder", 1, 2, 0),
    ):
        there, here = f"layers.{local}.", f"layers.{number}."
        norms = ["input_layernorm", "post_attention_layernorm"]
        attentions = ["self_attention"]
        if stack == "decoder":
            norms.append("post_inter_attention_layernorm")
            attentions.append("inter_attention")
        for name in (f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")):
            whole(p, stack, there + name, here + name, HIDDEN)
        for attention in attentions:
            name = f"{attention}.dense.weight"
            cut(p, stack, there + name, here + name, 1, HIDDEN, HIDDEN)
            name = f"{attention}.dense.bias"
            whole(p, stack, there + name, here + name, HIDDEN)
        for kind, rest in (("weight", (HIDDEN,)), ("bias", ())):
            name = f"self_attention.query_key_value.{kind}"
            heads(p, stack, there + name, here + name, 3, *rest)
            if stack == "decoder":
                name = f"inter_attention.key_value.{kind}"
                heads(p, stack, there + name, here + name, 2, *rest)
                name = f"inter_attention.query.{kind}"
                cut(p, stack, there + name, here + name, 0, HIDDEN, *rest)
            name = f"mlp.dense_h_to_4h.{kind}"
            cut(p, stack, there + name, here + name, 0, FFN, *rest)
        name = "mlp.dense_4h_to_h.weight"
        cut(p, stack, there + name, here + name, 1, HIDDEN, FFN)
        name = "mlp.dense_4h_to_h.bias"
        whole(p, stack, there + name, here + name, HIDDEN)
    for p, stack in ((0, "encoder"), (2, "decoder")):
        for kind in ("weight", "bias"):
            name = f"final_layernorm.{kind}"
            whole(p, stack, name, name, HIDDEN)
    return ours, files


def llama() -> tuple[Tensors, Files]:
    """A GPT of the Llama family of 1 layer on 2 tensor ranks, 4 heads in 2 groups."""
    ours: Tensors = {}
    h, lm, layer = HIDDEN, "language_model", "language_model.encoder.layers.0"
    words, output = numbers(PADDED, h), numbers(PADDED, h)
    queries = [[numbers(HEAD_SIZE, h) for _ in range(2)] for _ in range(2)]  # of each group
    keys, values = [numbers(HEAD_SIZE, h) for _ in range(2)], [numbers(HEAD_SIZE, h)] * 2
    dense, gate, up, down = numbers(h, h), numbers(FFN, h), numbers(FFN, h), numbers(h, FFN)
    norms = [numbers(h) for _ in range(3)]
    ours[f"{lm}.embedding.word_embeddings.weight"] = words[:VOCAB]
    ours[f"{lm}.output_layer.weight"] = output[:VOCAB]
    ours[f"{layer}.input_layernorm.weight"] = norms[0]
    ours[f"{layer}.self_attention.query_key_value.weight"] = torch.cat(
        [*queries[0], keys[0], values[0], *queries[1], keys[1], values[1]]
    )
    ours[f"{layer}.self_attention.dense.weight"] = dense
    ours[f"{layer}.post_attention_layernorm.weight"] = norms[1]
    ours[f"{layer}.mlp.dense_h_to_4h.weight"] = torch.cat((gate, up))
    ours[f"{layer}.mlp.dense_4h_to_h.weight"] = down
    ours[f"{lm}.encoder.final_layernorm.weight"] = norms[2]
    args = arguments(
        num_layers=1,
        swiglu=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        bias_gelu_fusion=False,
        group_query_attention=True,
        num_query_groups=2,
        untie_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=500000,
        rotary_percent=1.0,
        vocab_size=VOCAB,
        tokenizer_type="Llama2Tokenizer",
    )
    row = []
    for t in range(2):
        own, wide = slice(4 * t, 4 * t + 4), slice(6 * t, 6 * t + 6)
        layers = {
            "layers.0.input_norm.weight": norms[0],
            "layers.0.self_attention.query_key_value.weight": torch.cat(
                (*queries[t], keys[t], values[t])
            ),
            "layers.0.self_attention.dense.weight": dense[:, own].clone(),
            "layers.0.post_attention_norm.weight": norms[1],
            "layers.0.mlp.dense_h_to_4h.weight": torch.cat((gate[wide], up[wide])),
            "layers.0.mlp.dense_4h_to_h.weight": down[:, wide].clone(),
            "final_norm.weight": norms[2],
        }
        half = slice(8 * t, 8 * t + 8)
        language_model = {
            "embedding": {"word_embeddings": {"weight": words[half].clone()}},
            "encoder": layers,
            "output_layer": {"weight": output[half].clone()},
        }
        model = {"language_model": language_model}
        row.append({"args": args, "checkpoint_version": 3.0, "iteration": 9, "model": model})
    return ours, [row]


def save(directory: Path, files: Files, *, name: str = "iter_0000005", **options: Any) -> Path:
    """Save the files of all ranks; returns the checkpoint's directory."""
    for p, row in enumerate(files):
        for t, file in enumerate(row):
            rank = f"mp_rank_{t:02d}" if len(files) == 1 else f"mp_rank_{t:02d}_{p:03d}"
            (directory / name / rank).mkdir(parents=True)
            torch.save(file, directory / name / rank / "model_optim_rng.pt", **options)
    latest = name if name == "release" else str(int(name[5:]))
    (directory / "latest_checkpointed_iteration.txt").write_text(latest)
    return directory / name
