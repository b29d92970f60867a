"""What a conversion changed, measured from what lies on disk on either side.

Three things are compared: what the two configurations say (epsilons, activations, missing heads),
the values of every tensor, and what both models compute from one fixed input in float32. Values
only move: a tensor that differs is a fault of the conversion. Outputs may differ where a format
cannot say what the other says; the certificate tells why and by how much.

Letters: s sequence, d decoder's sequence.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import megatron
from megatron.config import ModelConfig
from megatron.conversion.network import (
    HIDDEN,
    MASKED_LM,
    NEXT_TOKEN,
    POOLED,
    Inputs,
    Outputs,
    run_network,
)
from megatron.conversion.stock import run_stock
from megatron.conversion.stored_model import StoredModel
from megatron.errors import CheckpointError

LARGEST_DIFFERENCE = 1e-3
SEQUENCE_LENGTH = 32
SEED = 1234

# Fields of ModelConfig that do not change what a trained model computes.
_FREE_FIELDS = {
    "make_vocab_size_divisible_by",
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "init_method_xavier_uniform",
    "fp16",
    "bf16",
    "fp64",
    "fp32_residual_connection",
    "attention_backend",
    "attention_softmax_in_fp32",
}
_RESOLVED = {
    "ffn_hidden_size": "ffn_size",
    "kv_channels": "head_size",
    "num_query_groups": "key_value_heads",
    "decoder_num_layers": "decoder_layers",
    "head_activation": "lm_head_activation",
}
_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class Side:
    """One side of a conversion: the model, and what computes it.

    shown: the path that the certificate names; stock: whether `transformers` runs it.
    """

    stored: StoredModel
    shown: str
    stock: bool

    def run(self, inputs: Inputs) -> Outputs:
        """The outputs of the model as it lies on disk."""
        stored = self.stored
        if self.stock:
            outputs = run_stock(stored, inputs)
            size = stored.model.vocab_size
            tokens = (MASKED_LM, NEXT_TOKEN)
            return {name: v[..., :size] if name in tokens else v for name, v in outputs.items()}
        return run_network(stored.model, stored.source, inputs)

    def describe(self) -> dict[str, Any]:
        """What the certificate says of this side."""
        stored = self.stored
        said: dict[str, Any] = {
            "format": stored.format,
            "path": self.shown,
            "evaluated_by": "transformers" if self.stock else "megatron",
            **stored.facts,
        }
        if stored.iteration is not None:
            said["iteration"] = stored.iteration
        return said


def compare(source: Side, target: Side, *, accept_difference: bool) -> dict[str, Any]:
    """The certificate of a conversion, as plain values for JSON.

    accept_difference: whether outputs may differ by more than `LARGEST_DIFFERENCE`.

    Raises:
        CheckpointError: they do, and may not; or a value was changed on its way.
    """
    inputs = fixed_input(source.stored.model)
    damaged = list(_changed_values(source.stored, target.stored))
    if damaged:
        raise CheckpointError(f"{_first_of(damaged)} changed on the way: nothing was written")
    ours, theirs = source.run(inputs), target.run(inputs)
    heads = _compared(ours, theirs)
    differences = {name: (ours[name] - theirs[name]).abs().max().item() for name in heads}
    worst = max(differences.values(), key=lambda value: (value != value, value))
    differing = list(_differing(source.stored, target.stored, ours, theirs))
    # Written so that NaN counts as too large.
    is_too_large = not worst <= LARGEST_DIFFERENCE
    if is_too_large and not accept_difference:
        raise CheckpointError(_too_different(source, worst, differing))
    return {
        "max_abs_logit_diff": worst,
        "max_abs_logit_diff_of": differences,
        "max_abs_logit": max(theirs[name].abs().max().item() for name in heads),
        "compared": "hidden states" if HIDDEN in heads else "logits",
        "accepted": is_too_large,  # on request, though it is
        "differences": differing,
        "notes": list(dict.fromkeys((*source.stored.notes, *target.stored.notes))),
        "dtype": "float32",
        "input": {name: tensor.tolist() for name, tensor in inputs.items()},
        "checkpoint": source.shown,
        "iteration": source.stored.iteration,
        "architecture": _architecture(source, target),
        "source": source.describe(),
        "target": target.describe(),
        "versions": versions(with_transformers=source.stock or target.stock),
    }


def fixed_input(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Two samples by their names in `transformers`, i64[2, s] each.

    The second has padding at its end where the network can be told so; BERT's have two sentences.
    """
    length = min(SEQUENCE_LENGTH, model.max_position_embeddings)
    generator = torch.Generator().manual_seed(SEED)
    assert model.vocab_size is not None
    ids = torch.randint(model.vocab_size, (2, length), generator=generator)
    if model.model_type == "gpt":
        return {"input_ids": ids}
    positions = torch.arange(length).expand(2, length)
    real = positions < torch.tensor([[length], [length - length // 3]])
    inputs = {"input_ids": ids, "attention_mask": real.long()}
    if model.model_type == "t5":
        inputs["decoder_input_ids"] = torch.randint(
            model.vocab_size, (2, length), generator=generator
        )
    elif model.num_tokentypes:
        inputs["token_type_ids"] = (
            (positions >= length // 2).long().clamp(max=model.num_tokentypes - 1)
        )
    return inputs


def versions(*, with_transformers: bool) -> dict[str, str]:
    """Versions of everything that took part in a comparison."""
    found = {
        "megatron": megatron.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if with_transformers:
        import transformers

        found["transformers"] = transformers.__version__
    return found


def _compared(ours: Outputs, theirs: Outputs) -> list[str]:
    """The heads that both have; where they share none, what heads are made from."""
    shared = [name for name in ours if name in theirs]
    heads = [name for name in shared if name not in (HIDDEN, POOLED)]
    return heads or shared


def _changed_values(source: StoredModel, target: StoredModel) -> Iterator[str]:
    """The tensors of both that differ in any bit."""
    for name in source.source.shapes:
        if name in target.source.shapes:
            ours, theirs = source.source.read(name), target.source.read(name)
            same_kind = ours.dtype == theirs.dtype and ours.shape == theirs.shape
            # As bytes: NaN is what it was, and -0.0 is not 0.0.
            if not (same_kind and torch.equal(_bytes(ours), _bytes(theirs))):
                yield name


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _differing(
    source: StoredModel, target: StoredModel, ours: Outputs, theirs: Outputs
) -> Iterator[str]:
    """A line for each difference between the two models, and for what only one of them has."""
    for field in dataclasses.fields(ModelConfig):
        attribute = _RESOLVED.get(field.name, field.name)
        there, here = getattr(source.model, attribute), getattr(target.model, attribute)
        if field.name not in _FREE_FIELDS and there != here:
            yield f"{field.name} is {there} in the source and {here} in the target"
    classes = [side.facts.get("architecture") for side in (source, target)]
    if None not in classes and classes[0] != classes[1]:
        yield f"the source is a {classes[0]} and the target a {classes[1]}"
    for one, other, says in (
        (source, target, "is not in the target"),
        (target, source, "is not in the source"),
    ):
        only = [name for name in one.source.shapes if name not in other.source.shapes]
        if only:
            yield f"{_first_of(only)} {says}"
    alone = sorted((set(ours) ^ set(theirs)) - {HIDDEN, POOLED})
    if alone:
        yield f"computed on one side only: {', '.join(alone)}"


def _first_of(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _too_different(source: Side, worst: float, differing: list[str]) -> str:
    reasons = f" ({'; '.join(differing)})" if differing else ""
    return (
        f"the logits of {source.shown} and of the converted model differ by {worst:.2e}, more than "
        f"{LARGEST_DIFFERENCE}: nothing was written; --accept-difference writes it anyway{reasons}"
    )


def _architecture(source: Side, target: Side) -> str:
    """The class of `transformers` that either side is for, or the kind of our network."""
    for side in (target, source):
        if side.stored.format == "hf":
            return str(side.stored.facts["architecture"])
    return source.stored.model.model_type
