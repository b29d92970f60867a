"""The GPT-2 of `transformers` with PyTorch's fused attention, in the usual loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from torch import nn

from benchmarks.peers import AbsentError
from benchmarks.peers.sizes import EPSILON, Sizes
from benchmarks.peers.updates import Update

_NAMES = {
    "qkv": "attn.c_attn",
    "projection": "attn.c_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}


def build(sizes: Sizes, layout: str) -> Callable[[], float]:
    """A step on one process; it has no layout of several."""
    if layout != "single":
        raise AbsentError("one process only")
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise AbsentError(str(error)) from error
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=sizes.vocabulary,
            n_positions=sizes.sequence,
            n_embd=sizes.hidden,
            n_layer=sizes.layers,
            n_head=sizes.heads,
            activation_function="gelu",
            layer_norm_epsilon=EPSILON,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            use_cache=False,
        )
    ).train()
    model.set_attn_implementation("sdpa")
    _fill(model, sizes)
    update = Update(model.parameters())
    batches = cycle(sizes.batches())

    def step() -> float:
        tokens = next(batches)
        # By itself the model would shift the labels, and have none for the last position.
        targets = tokens[:, 1:].contiguous()
        loss = model(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets).loss
        loss.backward()
        update()
        return loss.item()

    return step


@torch.no_grad()
def _fill(model: nn.Module, sizes: Sizes) -> None:
    """Give the model the common weights; its matrices are transposed, qkv is ordered [3, n, d]."""
    parameters = dict(model.named_parameters())
    parameters["transformer.wte.weight"].copy_(sizes.weights["words"])
    parameters["transformer.wpe.weight"].copy_(sizes.weights["positions"])
    for i in range(sizes.layers):
        for kind, name in _NAMES.items():
            weight = sizes.weights[f"{i}.{kind}"]
            if kind == "qkv":
                weight = weight.unflatten(0, (sizes.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            parameters[f"transformer.h.{i}.{name}.weight"].copy_(weight.t())
